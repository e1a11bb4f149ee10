"""Stage 0 leads its node: admits requests, forms iterations, follows every sequence to its end."""

from dataclasses import dataclass
from itertools import chain

from services.stage_worker.admission import Admission
from services.stage_worker.batcher import Sequence, chunk_of, form_iteration, tokens_of
from services.stage_worker.blocks import BlockAllocator
from shared.messages.inference import InferenceTask, IterationDone, SequenceChunk


@dataclass(frozen=True, slots=True)
class Iteration:
    """One forward of a mixed set of sequences; `tokens` are its rows, chunk after chunk."""

    number: int
    chunks: tuple[SequenceChunk, ...]
    tokens: tuple[int, ...]


class Head:
    """The state of a node's serving. Pure: told of every event, asked for the next iteration.

    A removed sequence's blocks are free at once: each stage runs iterations in order, so rows still in
    flight are written before the rows of whoever gets the blocks next.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        num_in_flight: int,
        token_budget: int,
        max_waiting: int,
        vocab_size: int,
        context_length: int | None = None,
    ) -> None:
        self.allocator = BlockAllocator(num_blocks, block_size)
        self.admission = Admission(
            self.allocator, max_waiting=max_waiting, vocab_size=vocab_size, context_length=context_length
        )
        self._num_in_flight = num_in_flight
        self._token_budget = token_budget
        self._running: dict[str, Sequence] = {}
        """In the order in which they were served last, longest unserved first."""
        self._in_flight: set[int] = set()
        self._next_number = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    def submit(self, task: InferenceTask, *, deadline_s: float, traceparent: str) -> None:
        """A request arrives. Raises RefusedError when it cannot be taken."""
        self.admission.offer(Sequence(task=task, deadline_s=deadline_s, traceparent=traceparent))

    def next_iteration(self) -> Iteration | None:
        """The next iteration to start now, if there is room in the pipeline and something to do."""
        self._running.update((sequence.task.task_id, sequence) for sequence in self.admission.admit())
        if len(self._in_flight) >= self._num_in_flight:
            return None
        rows = form_iteration(
            [sequence for sequence in self._running.values() if not sequence.in_flight],
            num_decoding=sum(sequence.is_decoding for sequence in self._running.values()),
            num_in_flight=self._num_in_flight,
            token_budget=self._token_budget,
        )
        return self._start(rows) if rows else None

    def _start(self, rows: list[tuple[Sequence, int]]) -> Iteration:
        number, self._next_number = self._next_number, self._next_number + 1
        block_size = self.allocator.block_size
        chunks = tuple(chunk_of(sequence, count, block_size=block_size) for sequence, count in rows)
        tokens = tuple(chain.from_iterable(tokens_of(sequence, count) for sequence, count in rows))
        for (sequence, count), chunk in zip(rows, chunks, strict=True):
            sequence.num_cached += count
            sequence.in_flight = chunk.produces
        self._in_flight.add(number)
        return Iteration(number, chunks, tokens)

    def finish_iteration(self, done: IterationDone) -> list[Sequence]:
        """An iteration has left the last stage; returns the sequences that it completed.

        Tells of iterations and sequences that are no longer known are ignored.
        """
        if done.iteration not in self._in_flight:
            return []
        self._in_flight.remove(done.iteration)
        completed = []
        for sampled in done.tokens:
            sequence = self._running.pop(sampled.task_id, None)
            if sequence is None:
                continue
            sequence.in_flight = False
            if sampled.finished or sampled.token is None:
                self.allocator.release(sequence.blocks)
                completed.append(sequence)
            else:
                sequence.generated.append(sampled.token)
                self._running[sampled.task_id] = sequence
        return completed

    def remove(self, task_id: str) -> bool:
        """Forget a sequence; False when it is not here."""
        sequence = self._running.pop(task_id, None)
        if sequence is None:
            return self.admission.remove(task_id)
        self.allocator.release(sequence.blocks)
        return True

    def expired(self, now_s: float) -> list[InferenceTask]:
        """Remove and return what is past its deadline."""
        everyone = [*self._running.values(), *self.admission.waiting()]
        late = [sequence.task for sequence in everyone if sequence.deadline_s <= now_s]
        for task in late:
            self.remove(task.task_id)
        return late

    def reset(self) -> list[InferenceTask]:
        """The pipeline broke: remove and return everything, with nothing in flight any more."""
        everyone = [*self._running.values(), *self.admission.waiting()]
        for sequence in everyone:
            self.remove(sequence.task.task_id)
        self._in_flight.clear()
        return [sequence.task for sequence in everyone]
