"""Runs iterations on the last stage, to their tokens.

On a node of one stage, static steps go ahead: before the host reads the tokens of one, the next is launched
on them. What it draws is given out when the next iteration asks for the same rows, and is dropped otherwise:
its keys and values lie where the rows are written again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, TypeAlias

from torch import Tensor

from services.stage_worker.compute.attention.chunks import Chunk, slots_of
from services.stage_worker.compute.executor import SequenceChunk, Took
from services.stage_worker.compute.iterations import Inputs, IterationRunner
from services.stage_worker.compute.logits import LogitPlan, Results
from services.stage_worker.compute.op_timer import OpTimer, call_timer
from services.stage_worker.compute.readback import Readback
from services.stage_worker.compute.sampling.sequences import SequenceState
from services.stage_worker.compute.sampling.step import Drawing

_Name: TypeAlias = tuple[str, int, int]
"""A task, the position of a row in its sequence, and the slot of its keys and values."""


class Asked(NamedTuple):
    """An iteration as the last stage is asked for it."""

    chunks: Sequence[SequenceChunk]
    states: Sequence[SequenceState]
    inputs: Inputs

    def only(self, places: Sequence[int]) -> "Asked":
        """These chunks of it, of the one stage of a node."""
        assert not isinstance(self.inputs, Tensor)
        ends = list(accumulate(chunk.num_tokens for chunk in self.chunks))
        rows = [slice(ends[place] - self.chunks[place].num_tokens, ends[place]) for place in places]
        return Asked(
            [self.chunks[place] for place in places],
            [self.states[place] for place in places],
            [token for each in rows for token in self.inputs[each]],
        )


class _Step(NamedTuple):
    """A step that was launched, with the tokens that it draws and the time that it takes."""

    tokens: Readback
    took: Took


@dataclass(frozen=True, slots=True)
class _Early:
    """A step that nobody has asked for yet."""

    step: _Step
    row_by_name: Mapping[_Name, int]


class TokenRunner:
    """All methods belong to the compute thread."""

    def __init__(self, iterations: IterationRunner, *, block_size: int, timer: OpTimer = call_timer) -> None:
        self._iterations = iterations
        self._timer = timer
        self._block_size = block_size
        self._early: _Early | None = None

    def forget(self) -> None:
        """The weights are other ones now than those that a step went ahead with."""
        self._early = None

    def run(self, asked: Asked, version: int | None) -> tuple[Results, Took]:
        """The results of an iteration, and the time that their own steps took, whenever these were launched.

        Raises CarrierError, VersionGoneError.
        """
        early, self._early = self._early, None
        row_of = self._rows_of(early, asked.chunks) if self._iterations.uses_steps_for(version) else {}
        if early is None or not row_of:
            return self._start(asked, version, goes_on=self._iterations.goes_ahead)
        others = [place for place in range(len(asked.chunks)) if place not in row_of]
        known = asked.only(list(row_of))
        results, failed = self._finish(known, early.step.tokens, list(row_of.values()), goes_on=not others)
        if not others:
            return (results, failed), early.step.took
        (more_results, more_failed), took = self._start(asked.only(others), version, goes_on=False)
        return (results + more_results, failed + more_failed), (*early.step.took, *took)

    def _rows_of(self, early: _Early | None, chunks: Sequence[SequenceChunk]) -> dict[int, int]:
        """The rows of the early step that are asked for now, by the places of their chunks."""
        if early is None:
            return {}
        decodes = [(place, chunk) for place, chunk in enumerate(chunks) if chunk.num_tokens == 1]
        named = [(place, self._name(chunk.task_id, _piece(chunk))) for place, chunk in decodes]
        return {place: early.row_by_name[name] for place, name in named if name in early.row_by_name}

    def _start(self, asked: Asked, version: int | None, *, goes_on: bool) -> tuple[Results, Took]:
        """Run these rows; `goes_on`: the next step may follow at once."""
        chunks, states, inputs = asked
        plan = LogitPlan(chunks, states)
        if drawings := plan.drawings:
            step = self._timed(lambda: self._iterations.draw(chunks, inputs, drawings, version))
            if step is not None:
                results = self._finish(asked, step.tokens, range(len(chunks)), goes_on=goes_on)
                return results, step.took
        end = self._timer()
        results = plan.results(self._iterations.run(chunks, inputs, plan.rows, version))
        return results, end()

    def _timed(self, launch: Callable[[], Readback | None]) -> _Step | None:
        end = self._timer()
        tokens = launch()
        return None if tokens is None else _Step(tokens, end())

    def _finish(self, asked: Asked, tokens: Readback, rows: Sequence[int], *, goes_on: bool) -> Results:
        """The results of chunks whose tokens are those of these rows of the last step."""
        plan = LogitPlan(asked.chunks, asked.states)
        assert plan.drawings is not None
        if goes_on:
            self._early = self._go_on(asked.chunks, plan.drawings, rows)
        drawn = tokens.wait()
        return plan.results_of([drawn[row] for row in rows])

    def _go_on(
        self, chunks: Sequence[SequenceChunk], drawings: Sequence[Drawing], rows: Sequence[int]
    ) -> _Early | None:
        """Launch the next row of each sequence, if all that have one have room for it."""
        following = [
            (chunk.task_id, Chunk(chunk.start + 1, 1, tuple(chunk.blocks)), row, next_drawing)
            for chunk, drawing, row in zip(chunks, drawings, rows, strict=True)
            if (next_drawing := drawing.following()) is not None
        ]
        if not following or any(not self._has_room(piece) for _, piece, _, _ in following):
            return None
        task_ids, pieces, rows, next_drawings = zip(*following, strict=True)
        step = self._timed(lambda: self._iterations.draw_on(pieces, rows, next_drawings))
        if step is None:
            return None
        names = map(self._name, task_ids, pieces)
        return _Early(step, {name: row for row, name in enumerate(names)})

    def _has_room(self, piece: Chunk) -> bool:
        return piece.end <= len(piece.blocks) * self._block_size

    def _name(self, task_id: str, piece: Chunk) -> _Name:
        return task_id, piece.start, slots_of([piece], self._block_size)[0]


def _piece(chunk: SequenceChunk) -> Chunk:
    return Chunk(chunk.start, chunk.num_tokens, chunk.blocks)
