"""Changes logits as a request asks, before a token is drawn from them.

In the order of transformers and vLLM: bias, repetition penalty, frequency and presence penalties, then what
is forbidden. Shape letters: R rows, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from services.stage_worker.compute.sampling.grammar import Forbidden
from services.stage_worker.compute.sampling.sequences import SequenceState

Entry = tuple[int, float]
"""A token and a number for it."""


def is_adjusted(state: SequenceState, index: int) -> bool:
    """Whether the logits of token `index` of a sequence are changed at all."""
    sampling = state.sampling
    return bool(
        sampling.logit_bias
        or sampling.has_penalties
        or state.grammar is not None
        or (index < sampling.min_tokens and sampling.stop_token_ids)
    )


def adjust_(logits_RV: Tensor, states: Sequence[SequenceState], indices: Sequence[int]) -> None:
    """Change float32 logits in place; `indices` says how many tokens each sequence has produced before."""
    _apply(logits_RV, [dict(state.sampling.logit_bias).items() for state in states], torch.add)
    _apply(logits_RV, [_repeated(state) for state in states], _penalise_repetition)
    _apply(logits_RV, [_penalties(state) for state in states], torch.sub)
    early = [_too_early(*one, logits_RV.shape[1]) for one in zip(states, indices, strict=True)]
    _apply(logits_RV, early, torch.add)
    _hold_to_grammars_(logits_RV, states)


def _hold_to_grammars_(logits_RV: Tensor, states: Sequence[SequenceState]) -> None:
    forbidden = {row: state.grammar.forbidden for row, state in enumerate(states) if state.grammar}
    if forbidden:
        rows = list(forbidden)
        is_forbidden_RV = torch.from_numpy(np.stack(list(forbidden.values()))).to(logits_RV.device)
        logits_RV[rows] = logits_RV[rows].masked_fill(is_forbidden_RV, -torch.inf)


def _apply(
    logits_RV: Tensor,
    entries: Sequence[Iterable[Entry]],
    change: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Put `change(logit, number)` in the place of each entry's logit.

    `entries`: those of each row, no token twice.
    """
    flat = [(row, token, number) for row, of_row in enumerate(entries) for token, number in of_row]
    if not flat:
        return
    rows, tokens, numbers = zip(*flat, strict=True)
    place = (
        torch.tensor(rows, device=logits_RV.device),
        torch.tensor(tokens, device=logits_RV.device),
    )
    by = torch.tensor(numbers, dtype=torch.float32, device=logits_RV.device)
    logits_RV[place] = change(logits_RV[place], by)


def _penalise_repetition(logits: Tensor, penalties: Tensor) -> Tensor:
    return torch.where(logits > 0, logits / penalties, logits * penalties)


def _repeated(state: SequenceState) -> Iterable[Entry]:
    penalty = state.sampling.repetition_penalty
    if penalty == 1:
        return ()
    return ((token, penalty) for token in state.prompt | state.generated.keys())


def _penalties(state: SequenceState) -> Iterable[Entry]:
    frequency, presence = state.sampling.frequency_penalty, state.sampling.presence_penalty
    if not (frequency or presence):
        return ()
    return ((token, count * frequency + presence) for token, count in state.generated.items())


def _too_early(state: SequenceState, index: int, vocab_size: int) -> Iterable[Entry]:
    """Tokens that must not end the sequence yet, unless the grammar allows no others."""
    if index >= state.sampling.min_tokens:
        return ()
    ends = [token for token in state.stop_token_ids if token < vocab_size]
    if state.grammar is not None and _must_end(state.grammar.forbidden, ends):
        return ()
    return ((token, -torch.inf) for token in ends)


def _must_end(forbidden: Forbidden, ends: Sequence[int]) -> bool:
    forbidden = forbidden.copy()
    forbidden[ends] = True
    return bool(forbidden.all())
