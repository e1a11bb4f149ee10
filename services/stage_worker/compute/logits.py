"""From an iteration's logits to results: the rows that the last stage needs, and each sequence's result."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from torch import Tensor

from services.stage_worker.compute.executor import SequenceChunk
from services.stage_worker.compute.sampling.adjust import is_adjusted
from services.stage_worker.compute.sampling.draw import draw
from services.stage_worker.compute.sampling.logprobs import logprobs
from services.stage_worker.compute.sampling.sequences import SequenceState
from services.stage_worker.compute.sampling.step import NO_TOKEN, Drawing
from shared.messages.inference import (
    FinishReason,
    SequenceResult,
    TaskFailed,
    TokenLogprob,
)

Results = tuple[tuple[SequenceResult, ...], tuple[TaskFailed, ...]]
"""The results of an iteration, and the sequences that cannot go on."""

NOT_FINITE = "the model's logits are not finite"


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """A chunk with its places among the rows of logits."""

    chunk: SequenceChunk
    state: SequenceState
    scored: range
    """Rows that predict its targets."""
    drawing: int | None
    """The row that draws its token."""

    @property
    def drawing_in_step(self) -> Drawing | None:
        """The draw, where it needs nothing but the logits, and nobody wants to know more of them."""
        sampling, index = self.state.sampling, self.chunk.index
        is_plain = not self.scored and sampling.num_logprobs is None and not is_adjusted(self.state, index)
        return Drawing(sampling, index) if self.drawing is not None and is_plain else None

    @property
    def places(self) -> Sequence[int]:
        return self.scored if self.drawing is None else (*self.scored, self.drawing)

    def result(self, by_place: Mapping[int, TokenLogprob]) -> SequenceResult:
        token = None if self.drawing is None else by_place.get(self.drawing)
        return SequenceResult(
            task_id=self.chunk.task_id,
            prompt=tuple(by_place[place] for place in self.scored),
            token=token,
            index=self.chunk.index,
            finish=self._finish(token),
        )

    def _finish(self, token: TokenLogprob | None) -> FinishReason | None:
        if token is not None:
            return self.state.finish_reason(token.token, self.chunk.index)
        return "length" if self.chunk.produces and self.drawing is None else None


class LogitPlan:
    """Made from the chunks before the forward, which needs `rows` only; `results` reads the logits of those.

    Shape letters: R rows of logits, V vocabulary.
    """

    def __init__(self, chunks: Sequence[SequenceChunk], states: Sequence[SequenceState]) -> None:
        self.rows: list[int] = []
        """Rows of the iteration whose logits are needed, in the order of the chunks."""
        self._pieces: list[_Piece] = []
        first = 0
        for chunk, state in zip(chunks, states, strict=True):
            self._add(chunk, state, first)
            first += chunk.num_tokens

    def _add(self, chunk: SequenceChunk, state: SequenceState, first: int) -> None:
        start = len(self.rows)
        self.rows.extend(range(first, first + len(chunk.targets)))
        scored = range(start, len(self.rows))
        draws = chunk.produces and state.sampling.max_tokens > 0
        self._pieces.append(_Piece(chunk, state, scored, len(self.rows) if draws else None))
        if draws:
            self.rows.append(first + chunk.num_tokens - 1)

    @property
    def drawings(self) -> list[Drawing] | None:
        """The draw of each chunk, if all can be made in a static step."""
        drawings = [piece.drawing_in_step for piece in self._pieces]
        return [each for each in drawings if each is not None] if None not in drawings else None

    def results(self, logits_RV: Tensor) -> Results:
        """A result for each chunk that has something to tell: scored prompt tokens, a new token, its end.

        Sequences that cannot go on fail instead. One whose grammar is not ready has no token yet.
        """
        sick = set((~logits_RV.amax(dim=-1).isfinite()).nonzero().flatten().tolist())
        drawing = {piece.drawing for piece in self._pieces if piece.state.is_ready()} - {None}
        failures = self._failures(sick, drawing)
        pieces = [piece for piece in self._pieces if piece.chunk.task_id not in failures]
        tokens = _targets(pieces) | _draw(logits_RV, [piece for piece in pieces if piece.drawing in drawing])
        return _results(pieces, _with_logprobs(logits_RV, pieces, tokens)), tuple(failures.values())

    def results_of(self, tokens: Sequence[int]) -> Results:
        """The same where `drawings` were made: a token, or NO_TOKEN, for each chunk."""
        sick = {place for place, token in enumerate(tokens) if token == NO_TOKEN}
        failures = self._failures(sick, set())
        pieces = [piece for piece in self._pieces if piece.chunk.task_id not in failures]
        by_place = {place: TokenLogprob(token=token) for place, token in enumerate(tokens)}
        return _results(pieces, by_place), tuple(failures.values())

    def _failures(self, sick: Set[int], drawing: Set[int | None]) -> dict[str, TaskFailed]:
        """By the task's id. `drawing`: rows that draw a token now."""
        return {
            piece.chunk.task_id: failure
            for piece in self._pieces
            if (failure := _failure(piece, sick, draws=piece.drawing in drawing))
        }


def _results(pieces: Sequence[_Piece], by_place: Mapping[int, TokenLogprob]) -> tuple[SequenceResult, ...]:
    """The results, after which the sequences go on with their tokens."""
    results = tuple(piece.result(by_place) for piece in pieces if piece.scored or piece.chunk.produces)
    states = {piece.chunk.task_id: piece.state for piece in pieces}
    for result in results:
        if result.token is not None and result.finish is None:
            states[result.task_id].drew(result.token.token)
    return results


def _failure(piece: _Piece, sick: Set[int], *, draws: bool) -> TaskFailed | None:
    """Why the sequence cannot go on. `sick`: rows whose logits are not finite."""
    task_id = piece.chunk.task_id
    if not sick.isdisjoint(piece.places):
        return TaskFailed(task_id=task_id, code=500, reason=NOT_FINITE)
    reason = piece.state.grammar.failure if draws and piece.state.grammar else None
    return TaskFailed(task_id=task_id, code=400, reason=reason) if reason else None


def _targets(pieces: Sequence[_Piece]) -> dict[int, int]:
    """The prompt token that each scored row predicts, by its place."""
    return {
        place: token
        for piece in pieces
        for place, token in zip(piece.scored, piece.chunk.targets, strict=True)
    }


def _draw(logits_RV: Tensor, pieces: Sequence[_Piece]) -> dict[int, int]:
    """The new token of each piece, by its place."""
    places = [piece.drawing for piece in pieces if piece.drawing is not None]
    if not places:
        return {}
    rows_RV = logits_RV if len(places) == len(logits_RV) else logits_RV[places]
    states = [piece.state for piece in pieces]
    tokens = draw(rows_RV, states, [piece.chunk.index for piece in pieces])
    return dict(zip(places, tokens, strict=True))


def _with_logprobs(
    logits_RV: Tensor, pieces: Sequence[_Piece], tokens: Mapping[int, int]
) -> dict[int, TokenLogprob]:
    """The same tokens with the log-probabilities that each piece asks for, by their places."""
    by_place = {place: TokenLogprob(token=token) for place, token in tokens.items()}
    num_top = {
        place: piece.state.sampling.num_logprobs
        for piece in pieces
        if piece.state.sampling.num_logprobs is not None
        for place in piece.places
        if place in tokens
    }
    if num_top:
        wanted = list(num_top)
        scored = logprobs(logits_RV[wanted], [tokens[place] for place in wanted], list(num_top.values()))
        by_place |= zip(wanted, scored, strict=True)
    return by_place
