"""A stage's knowledge of the running sequences: each is registered once, and iterations only name it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from services.stage_worker.compute.executor import SequenceChunk
from services.stage_worker.compute.sampling.sequences import SequenceState
from shared.errors import UnknownSequenceError
from shared.messages.inference import Iteration, NewBlocks, SequenceStart


@dataclass(slots=True)
class _Known:
    """A sequence as far as it has come on this stage."""

    start: SequenceStart
    state: SequenceState | None
    """At the last stage only."""
    blocks: list[int] = field(default_factory=list)
    num_cached: int = 0
    """Rows that others had computed before it began."""
    num_rows: int = 0
    """Rows from its beginning on whose keys and values are in the cache here."""
    num_scored: int = 0
    """Rows of the prompt that were scored, where it is: nothing is told twice."""


class Entered(NamedTuple):
    """An iteration as this stage's executor needs it: for each sequence its rows, and how it is drawn."""

    chunks: tuple[SequenceChunk, ...]
    states: tuple[SequenceState, ...]
    """At the last stage only."""
    num_cached: tuple[int, ...]
    """Prompt tokens that others had computed before each sequence began."""


class SequenceTable:
    """All sequences that run here, by their numbers on the node."""

    def __init__(self, begin: Callable[[SequenceStart], SequenceState] | None, *, block_size: int) -> None:
        """`begin`: how a sequence's tokens are drawn; None: another stage draws them."""
        self._begin = begin
        self._block_size = block_size
        self._known: dict[int, _Known] = {}
        self._filled: set[int] = set()
        """Blocks that iterations have filled since this stage began: others cannot be shared."""

    def __len__(self) -> int:
        return len(self._known)

    def clear(self) -> None:
        self._known.clear()

    def enter(self, iteration: Iteration) -> Entered:
        """Take in an iteration, whose `left` are forgotten.

        Raises UnknownSequenceError when earlier rows of a sequence, or its beginning, never came here.
        """
        for number in iteration.left:
            self._known.pop(number, None)
        firsts = dict(zip(iteration.sequences, iteration.starts, strict=True)) if iteration.begins else {}
        for start in iteration.begins:
            state = self._begin(start) if self._begin else None
            self._known[start.sequence] = _Known(start, state, num_cached=firsts.get(start.sequence, 0))
        known = [self._find(number) for number in iteration.sequences]
        for new in iteration.new_blocks:
            self._note_blocks(known[new.place], new, start=iteration.starts[new.place])
        columns = zip(known, iteration.starts, iteration.counts, iteration.produces, strict=True)
        chunks = tuple(_chunk(*column) for column in columns)
        states = tuple(each.state for each in known if each.state is not None)
        return Entered(chunks, states, tuple(each.num_cached for each in known))

    def _find(self, number: int) -> _Known:
        if (known := self._known.get(number)) is None:
            raise UnknownSequenceError(f"the beginning of sequence {number} never came to this stage")
        return known

    def _note_blocks(self, known: _Known, new: NewBlocks, *, start: int) -> None:
        """Rows before `start` are those of the blocks, when all are new. Raises UnknownSequenceError."""
        known.blocks[new.first :] = new.blocks
        if new.first == 0:
            known.num_rows = start
            if not self._filled.issuperset(new.blocks[: start // self._block_size]):
                raise UnknownSequenceError(f"the beginning of {known.start.task_id} is not in this cache")
        self._filled.update(new.blocks)


def _chunk(known: _Known, start: int, num_tokens: int, produces: bool) -> SequenceChunk:
    """The sequence's next rows. Raises UnknownSequenceError."""
    facts, end = known.start, start + num_tokens
    if start > known.num_rows:
        missing = f"rows {known.num_rows} to {start - 1} of {facts.task_id}"
        raise UnknownSequenceError(f"{missing} never came to this stage")
    known.num_rows = end
    return SequenceChunk(
        task_id=facts.task_id,
        start=start,
        num_tokens=num_tokens,
        blocks=known.blocks,
        produces=produces,
        index=max(0, end - facts.num_prompt_tokens),
        num_given=len(facts.given),
        targets=_targets(known, start, end),
        traceparent=facts.traceparent if start < facts.num_prompt_tokens else "",
    )


def _targets(known: _Known, start: int, end: int) -> tuple[int, ...]:
    if not known.start.prompt_logprobs or start < known.num_scored:
        return ()
    known.num_scored = end
    return known.start.prompt[start + 1 : end + 1]
