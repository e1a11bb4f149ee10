"""Leads a node (at stage 0): admits requests, forms iterations, follows every sequence to its end."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from services.stage_worker.node.admission import Admission
from services.stage_worker.node.batcher import Sequence, chunk_of, form_iteration, form_scoring, tokens_of
from services.stage_worker.node.blocks import BlockAllocator
from services.stage_worker.node.serving_versions import ServedVersions
from shared.errors import RefusedError
from shared.messages.inference import InferenceTask, IterationDone, SequenceChunk
from shared.messages.weights import ServingRule


@dataclass(frozen=True, slots=True)
class Iteration:
    """One forward of a mixed set of sequences; `tokens` are its rows, chunk after chunk."""

    number: int
    chunks: tuple[SequenceChunk, ...]
    tokens: tuple[int, ...] = ()
    version: int | None = None
    """Weights version of all its sequences; None: each stage's newest."""
    deferrable: bool = False
    """All other work may overtake it."""
    left: tuple[str, ...] = ()
    """Tasks that the last stage can forget."""


class NodeScheduler:
    """The state of a node's serving. Pure: takes in every event, gives the next iteration.

    A removed sequence's blocks are free at once. Each stage runs iterations in order, so rows still in flight
    are written before the rows of the sequence that gets the blocks next. Deferrable tasks have no blocks:
    whole prompts are scored at once, in iterations that all others may overtake.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        num_in_flight: int,
        token_budget: int,
        max_deferrable_tokens: int,
        max_waiting: int,
        vocab_size: int,
        context_length: int | None = None,
    ) -> None:
        self.allocator = BlockAllocator(num_blocks, block_size)
        self.admission = Admission(
            self.allocator, max_waiting=max_waiting, vocab_size=vocab_size, context_length=context_length
        )
        self.versions = ServedVersions()
        self._num_in_flight = num_in_flight
        self._token_budget = token_budget
        self._max_deferrable_tokens = max_deferrable_tokens
        self._max_waiting = max_waiting
        self._running: dict[str, Sequence] = {}
        """In the order in which they were served last, longest unserved first."""
        self._deferrable: dict[str, Sequence] = {}
        """In the order of arrival; those in flight are in one iteration."""
        self._in_flight: dict[int, Iteration] = {}
        self._left: dict[str, None] = {}
        """Tasks removed before their end that the last stage still has to forget, in order."""
        self._next_number = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def versions_in_use(self) -> tuple[int, ...]:
        """Kept versions that sequences or iterations in flight need, oldest first."""
        wanted = {iteration.version for iteration in self._in_flight.values()}
        wanted |= {self.versions.of(sequence) for sequence in self._running.values()}
        return tuple(sorted(version for version in wanted if version is not None))

    def submit(self, task: InferenceTask, *, deadline_s: float, traceparent: str) -> None:
        """Take in a request. Raises RefusedError when it cannot be taken."""
        sequence = Sequence(
            task=task, deadline_s=deadline_s, traceparent=traceparent, version=task.weights_version
        )
        if task.deferrable:
            self._check_deferrable(task)
            self._deferrable[task.task_id] = sequence
        else:
            self.admission.offer(sequence)

    def _check_deferrable(self, task: InferenceTask) -> None:
        """Check a deferrable task. Raises RefusedError."""
        self.admission.check_words(task)
        if task.sampling.max_tokens > 0:
            raise RefusedError("a deferrable task scores its prompt: max_tokens must be 0", code=400)
        if len(task.prompt) > self._max_deferrable_tokens:
            raise RefusedError(
                f"a deferrable prompt has at most {self._max_deferrable_tokens} tokens", code=400
            )
        if len(self._deferrable) >= self._max_waiting:
            raise RefusedError(f"{self._max_waiting} deferrable tasks are already waiting", code=429)

    def next_iteration(self) -> Iteration | None:
        """The next iteration to start now, if there is room in the pipeline and work for it."""
        admitted = self.admission.admit()
        self.versions.begin(admitted)
        self._running.update((sequence.task.task_id, sequence) for sequence in admitted)
        ready = [sequence for sequence in self._running.values() if not sequence.in_flight]
        if not ready:
            return self._next_scoring()
        if sum(not iteration.deferrable for iteration in self._in_flight.values()) >= self._num_in_flight:
            return None
        version = self.versions.of_next_iteration(ready, self._next_number)
        rows = form_iteration(
            [sequence for sequence in ready if self.versions.of(sequence) == version],
            num_decoding=sum(sequence.is_decoding for sequence in self._running.values()),
            num_in_flight=self._num_in_flight,
            token_budget=self._token_budget,
        )
        iteration = self._start(rows, version)
        for (sequence, count), chunk in zip(rows, iteration.chunks, strict=True):
            sequence.num_cached += count
            sequence.in_flight = chunk.produces
        return iteration

    def _next_scoring(self) -> Iteration | None:
        """An iteration of deferrable tasks, when no other one of them is under way."""
        if any(iteration.deferrable for iteration in self._in_flight.values()):
            return None
        rows = form_scoring(self._deferrable.values(), token_budget=self._token_budget)
        return self._start(rows, rows[0][0].version, deferrable=True) if rows else None

    def _start(
        self, rows: list[tuple[Sequence, int]], version: int | None, *, deferrable: bool = False
    ) -> Iteration:
        number, self._next_number = self._next_number, self._next_number + 1
        block_size = self.allocator.block_size
        chunks = tuple(chunk_of(sequence, count, block_size=block_size) for sequence, count in rows)
        tokens = tuple(chain.from_iterable(tokens_of(sequence, count) for sequence, count in rows))
        for sequence, _ in rows:
            sequence.has_begun = True
        iteration = Iteration(number, chunks, tokens, version, deferrable, tuple(self._left))
        self._left.clear()
        self._in_flight[number] = iteration
        return iteration

    def finish_iteration(self, done: IterationDone) -> list[Sequence]:
        """Take in an iteration that has left the last stage; returns the sequences that it completed.

        Iterations and sequences that are no longer known are ignored.
        """
        if self._in_flight.pop(done.iteration, None) is None:
            return []
        completed = []
        for sampled in done.tokens:
            sequence = self._running.pop(sampled.task_id, None) or self._deferrable.pop(sampled.task_id, None)
            if sequence is None:
                continue
            sequence.in_flight = False
            if sampled.finished:
                self.allocator.release(sequence.blocks)
                completed.append(sequence)
                continue
            if sampled.token is None:  # not yet: its newest row comes again
                sequence.num_cached -= 1
            else:
                sequence.generated.append(sampled.token)
            self._running[sampled.task_id] = sequence
        return completed

    def lose_iteration(self, number: int) -> list[InferenceTask]:
        """Take in that an iteration was lost: remove and return the tasks that were in it."""
        iteration = self._in_flight.pop(number, None)
        if iteration is None:
            return []
        self._left.update(dict.fromkeys(iteration.left))
        return self.lose(chunk.task_id for chunk in iteration.chunks)

    def lose(self, task_ids: Iterable[str]) -> list[InferenceTask]:
        """Remove and return the tasks among these that are here."""
        everyone = {sequence.task.task_id: sequence.task for sequence in self._everyone()}
        return self._remove_all(everyone[task_id] for task_id in task_ids if task_id in everyone)

    def remove(self, task_id: str) -> bool:
        """Forget a sequence; False when it is not here."""
        if self._deferrable.pop(task_id, None) is not None:
            return True
        sequence = self._running.pop(task_id, None)
        if sequence is None:
            return self.admission.remove(task_id)
        self.allocator.release(sequence.blocks)
        if sequence.has_begun:
            self._left[task_id] = None
        return True

    def expired(self, now_s: float) -> list[InferenceTask]:
        """Remove and return the tasks that are past their deadline."""
        return self._remove_all(each.task for each in self._everyone() if each.deadline_s <= now_s)

    def restored(self, version: int, rule: ServingRule, *, is_same: bool = True) -> list[InferenceTask]:
        """Note that the stages serve only these weights: remove and return the tasks that want others.

        `is_same`: the weights that had that number until now, if any, were the same.
        """
        goes_on = (None, version) if is_same else (None,)
        lost = self._remove_all(each.task for each in self._everyone() if each.version not in goes_on)
        self.versions.restored(version, rule)
        for sequence in self._running.values():
            sequence.version = sequence.task.weights_version
        self.versions.begin(self._running.values())
        return lost

    def reset(self) -> list[InferenceTask]:
        """Remove and return everything after the pipeline broke; nothing is in flight any more."""
        for iteration in self._in_flight.values():
            self._left.update(dict.fromkeys(iteration.left))
        self._in_flight.clear()
        return self._remove_all(each.task for each in self._everyone())

    def _everyone(self) -> list[Sequence]:
        return [*self._running.values(), *self.admission.waiting(), *self._deferrable.values()]

    def _remove_all(self, tasks: Iterable[InferenceTask]) -> list[InferenceTask]:
        removed = list(tasks)
        for task in removed:
            self.remove(task.task_id)
        return removed
