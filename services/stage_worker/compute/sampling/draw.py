"""Draws tokens from logits, each by its sequence's seed and position only, never by its company.

Shape letters: R rows, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from services.stage_worker.compute.sampling.adjust import adjust_, is_adjusted
from services.stage_worker.compute.sampling.sequences import SequenceState
from shared.messages.inference import Sampling


def draw(logits_RV: Tensor, states: Sequence[SequenceState], indices: Sequence[int]) -> list[int]:
    """One token for each row; `indices` says how many tokens each sequence has produced before."""
    samplings = [state.sampling for state in states]
    adjusted = [row for row, one in enumerate(states) if is_adjusted(one, indices[row])]
    if not adjusted:
        return _draw(logits_RV, samplings, indices)
    changed_RV = logits_RV[adjusted].float()
    adjust_(changed_RV, [states[row] for row in adjusted], [indices[row] for row in adjusted])
    others = sorted(set(range(len(states))) - set(adjusted))
    tokens = dict(zip(adjusted, _draw_some(changed_RV, samplings, indices, adjusted), strict=True))
    if others:
        tokens |= zip(others, _draw_some(logits_RV[others], samplings, indices, others), strict=True)
    return [tokens[row] for row in range(len(states))]


def _draw_some(
    logits_RV: Tensor, samplings: Sequence[Sampling], indices: Sequence[int], rows: Sequence[int]
) -> list[int]:
    """Draw for these `rows` only, whose logits are `logits_RV`."""
    return _draw(logits_RV, [samplings[row] for row in rows], [indices[row] for row in rows])


def _draw(logits_RV: Tensor, samplings: Sequence[Sampling], indices: Sequence[int]) -> list[int]:
    chosen = logits_RV.argmax(dim=-1)
    rows = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if rows:
        drawing = [samplings[row] for row in rows]
        probabilities_RV = _probabilities(logits_RV[rows].float(), drawing)
        uniforms = [uniform(samplings[row].seed, indices[row]) for row in rows]
        uniforms_R1 = torch.tensor(uniforms, dtype=torch.float64, device=logits_RV.device).unsqueeze(1)
        chosen[rows] = choose(probabilities_RV, uniforms_R1)
    tokens: list[int] = chosen.tolist()
    return tokens


def _probabilities(logits_RV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Probabilities of the tokens that may be drawn, up to a factor for each row.

    Divides by the temperature, then drops tokens by top-k, top-p and min-p.
    """
    scaled_RV = scale(logits_RV, _column([sampling.temperature for sampling in samplings], logits_RV))
    _cut(scaled_RV, [sampling.top_k for sampling in samplings], 0, _drop_beyond_top_k)
    probabilities_RV = torch.softmax(scaled_RV, dim=-1)
    _cut(probabilities_RV, [sampling.top_p for sampling in samplings], 1.0, drop_beyond_top_p)
    _cut(probabilities_RV, [sampling.min_p for sampling in samplings], 0.0, drop_below_min_p)
    return probabilities_RV


def scale(logits_RV: Tensor, temperatures_R1: Tensor) -> Tensor:
    """Differences to the likeliest token, divided by the temperature; the coldest gives no infinities."""
    differences_RV = logits_RV - logits_RV.amax(dim=-1, keepdim=True)
    return differences_RV.div_(temperatures_R1.clamp(min=torch.finfo(torch.float32).tiny))


def _cut(
    values_RV: Tensor, limits: Sequence[float], no_limit: float, drop: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Put `drop(values, limits)` in the place of the rows that have a limit; the others cost nothing."""
    rows = [row for row, limit in enumerate(limits) if limit != no_limit]
    if rows:
        part_RV = values_RV[rows]
        values_RV[rows] = drop(part_RV, _column([limits[row] for row in rows], part_RV))


def _drop_beyond_top_k(logits_RV: Tensor, top_k_R1: Tensor) -> Tensor:
    places_R1 = top_k_R1.long().clamp(max=logits_RV.shape[1]) - 1
    likeliest_RK = logits_RV.topk(int(places_R1.max()) + 1, dim=-1).values
    return drop_below_place(logits_RV, likeliest_RK, places_R1)


def drop_below_place(logits_RV: Tensor, likeliest_RK: Tensor, places_R1: Tensor) -> Tensor:
    """Keep the logits that reach the one at each row's place among its likeliest, first the highest."""
    return logits_RV.masked_fill(logits_RV < likeliest_RK.gather(1, places_R1), -torch.inf)


def drop_beyond_top_p(probabilities_RV: Tensor, top_p_R1: Tensor) -> Tensor:
    """Keep the nucleus: the likeliest tokens until their mass reaches top_p, the first one always."""
    sorted_RV, tokens_RV = probabilities_RV.sort(dim=-1, descending=True, stable=True)
    before_RV = sorted_RV.cumsum(dim=-1) - sorted_RV
    is_tail_RV = before_RV >= top_p_R1
    is_tail_RV[:, 0] = False
    return probabilities_RV.scatter(1, tokens_RV, sorted_RV.masked_fill(is_tail_RV, 0.0))


def drop_below_min_p(probabilities_RV: Tensor, min_p_R1: Tensor) -> Tensor:
    """Keep tokens with at least this share of the likeliest one's probability."""
    least_R1 = min_p_R1 * probabilities_RV.amax(dim=-1, keepdim=True)
    return probabilities_RV.masked_fill(probabilities_RV < least_R1, 0.0)


def choose(probabilities_RV: Tensor, uniforms_R1: Tensor) -> Tensor:
    """The first token [R] of each row up to which the mass is more than the uniform's share of the whole."""
    # In float64 the order of the sum, which is the device's own business, has no say in the token.
    mass_RV = probabilities_RV.cumsum(dim=-1, dtype=torch.float64)
    whole_R1 = mass_RV[:, -1:]
    share_R1 = uniforms_R1 * whole_R1
    below_whole_R1 = torch.nextafter(whole_R1, torch.zeros_like(whole_R1))
    return torch.searchsorted(mass_RV, torch.minimum(share_R1, below_whole_R1), right=True).squeeze(1)


def _column(numbers: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=like.device).unsqueeze(1)


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) for draw `index` of a sequence (splitmix64: Steele et al., OOPSLA 2014)."""
    mask = (1 << 64) - 1
    state = (seed + (index + 1) * 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return ((state ^ (state >> 31)) >> 11) / (1 << 53)
