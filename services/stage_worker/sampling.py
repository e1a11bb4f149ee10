"""Draws tokens from logits, each by its sequence's seed and position only, never by its company."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shared.messages.inference import FinishReason, Sampling, TokenLogprob


def draw(logits_RV: Tensor, samplings: Sequence[Sampling], indices: Sequence[int]) -> list[int]:
    """One token for each row; `indices` says how many tokens each sequence has produced before."""
    greedy = logits_RV.argmax(dim=-1)
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if drawn:
        uniforms = [uniform(samplings[row].seed, indices[row]) for row in drawn]
        greedy[drawn] = _draw_rows(logits_RV[drawn], [samplings[row] for row in drawn], uniforms)
    tokens: list[int] = greedy.tolist()
    return tokens


def _draw_rows(logits_RV: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> Tensor:
    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=logits_RV.device).unsqueeze(1)

    # Differences to the likeliest token, and no divisor of 0: the coldest temperature gives no infinities.
    logits_RV = logits_RV.float() - logits_RV.float().max(dim=-1, keepdim=True).values
    coldest = torch.finfo(torch.float32).tiny
    temperatures = column([s.temperature for s in samplings]).clamp(min=coldest)
    probabilities = torch.softmax(logits_RV / temperatures, dim=-1)
    sorted_RV, tokens_RV = probabilities.sort(dim=-1, descending=True)
    before_RV = sorted_RV.cumsum(dim=-1) - sorted_RV
    # The nucleus: the likeliest tokens until their mass reaches top_p, the first one always.
    is_tail_RV = before_RV >= column([s.top_p for s in samplings])
    is_tail_RV[:, 0] = False
    kept_RV = sorted_RV.masked_fill(is_tail_RV, 0.0)
    mass_RV = kept_RV.cumsum(dim=-1)
    choice = torch.searchsorted(mass_RV, column(uniforms) * mass_RV[:, -1:], right=True)
    last_kept = (kept_RV > 0).sum(dim=-1, keepdim=True) - 1
    return tokens_RV.gather(1, torch.minimum(choice, last_kept)).squeeze(1)


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) for draw `index` of a sequence (splitmix64: Steele et al., OOPSLA 2014)."""
    mask = (1 << 64) - 1
    state = (seed + (index + 1) * 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return ((state ^ (state >> 31)) >> 11) / (1 << 53)


def logprobs(logits_RV: Tensor, tokens: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprob]:
    """Log-probability of each row's token under the model itself (temperature 1), with the likeliest."""
    logprobs_RV = torch.log_softmax(logits_RV.float(), dim=-1)
    chosen = (
        logprobs_RV.gather(1, torch.tensor(tokens, device=logits_RV.device).unsqueeze(1)).squeeze(1).tolist()
    )
    values, ids = logprobs_RV.topk(max(1, *num_top), dim=-1)
    return [
        TokenLogprob(
            token=token, logprob=logprob, top=tuple(zip(top_ids[:count], top_values[:count], strict=True))
        )
        for token, logprob, top_ids, top_values, count in zip(
            tokens, chosen, ids.tolist(), values.tolist(), num_top, strict=True
        )
    ]


def finish_reason(token: int, index: int, sampling: Sampling) -> FinishReason | None:
    """Whether the token, the sequence's number `index`, ends it."""
    if token in sampling.stop_token_ids:
        return "stop"
    return "length" if index + 1 >= sampling.max_tokens else None
