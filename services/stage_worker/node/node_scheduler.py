"""Leads a node (at stage 0): admits requests, forms iterations, follows every sequence to its end."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

from services.stage_worker.node.admission import Admission
from services.stage_worker.node.batcher import Rows, form_iteration, form_scoring, new_blocks_of
from services.stage_worker.node.kv_blocks import KVBlocks
from services.stage_worker.node.ready import ReadySequences
from services.stage_worker.node.sequence import Sequence
from services.stage_worker.node.serving_versions import ServedVersions
from shared.errors import RefusedError
from shared.messages.inference import InferenceTask, Iteration, IterationDone, SampledToken
from shared.messages.weights import ServingRule


@dataclass(frozen=True, slots=True)
class FirstRows:
    """An iteration with the token ids of its rows, as stage 0 begins it."""

    iteration: Iteration
    tokens: tuple[int, ...]


class NodeScheduler:
    """The state of a node's serving. Pure: takes in every event, gives the next iteration.

    A removed sequence's blocks are free at once. Each stage runs iterations in order, so rows still in flight
    are written before the rows of the sequence that gets the blocks next. Deferrable tasks have no blocks:
    whole prompts are scored at once, in iterations that all others may overtake.

    When blocks run out, the youngest sequence loses its own and waits again. Its tokens so far are then a
    prompt, computed again; the last stage goes on to draw from where it was. The oldest never loses its
    blocks, so there is always one that goes on.
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
        num_rows_ahead: int = 0,
    ) -> None:
        """`num_rows_ahead`: sequences get blocks for so many rows more, as long as some are free."""
        self.blocks = KVBlocks(num_blocks, block_size)
        self.admission = Admission(
            self.blocks, max_waiting=max_waiting, vocab_size=vocab_size, context_length=context_length
        )
        self.versions = ServedVersions()
        self.newest_version = 0
        """The version of stage 0's newest weights."""
        self.num_preempted = 0
        """How often a sequence has lost its blocks to an older one."""
        self._num_in_flight = num_in_flight
        self._token_budget = token_budget
        self._max_deferrable_tokens = max_deferrable_tokens
        self._max_waiting = max_waiting
        self._num_rows_ahead = num_rows_ahead
        self._here: dict[str, Sequence] = {}
        """Every sequence by its task, in the order of arrival."""
        self._running: dict[int, Sequence] = {}
        """Those with blocks."""
        self._ready = ReadySequences()
        """Those of them whose next rows depend on nothing in flight."""
        self._deferrable: dict[int, Sequence] = {}
        """In the order of arrival; those in flight are in one iteration."""
        self._in_flight: dict[int, Iteration] = {}
        self._scoring: int | None = None
        """The number of the deferrable iteration in flight."""
        self._left: dict[int, None] = {}
        """Sequences that are over and that the stages still have to forget, in order."""
        self._next_sequence = 0
        self._next_number = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def versions_in_use(self) -> tuple[int, ...]:
        """Kept versions that sequences or iterations in flight need, oldest first."""
        flying = {each.version for each in self._in_flight.values() if each.version is not None}
        return tuple(sorted(self.versions.in_use | flying))

    def submit(self, task: InferenceTask, *, deadline_s: float, traceparent: str) -> None:
        """Take in a request. Raises RefusedError when it cannot be taken."""
        sequence = Sequence(
            number=self._next_sequence,
            task=task,
            deadline_s=deadline_s,
            traceparent=traceparent,
            version=task.weights_version,
        )
        if task.deferrable:
            self._check_deferrable(task)
            self._deferrable[sequence.number] = sequence
        else:
            self.admission.offer(sequence)
        self._here[task.task_id] = sequence
        self._next_sequence += 1

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

    def next_iteration(self) -> FirstRows | None:
        """The next iteration to start now, if there is room in the pipeline and work for it."""
        self._admit()
        if not self._ready:
            return self._next_scoring()
        if len(self._in_flight) - (self._scoring is not None) >= self._num_in_flight:
            return None
        while self._ready:
            version = self.versions.of_next_iteration(self._ready.versions(), self._next_number)
            num_preempted = self.num_preempted
            if rows := self._with_blocks(self._form(version)):
                return self._start(rows, version)
            if self.num_preempted == num_preempted:
                break  # they wait for blocks of sequences in flight
        return None

    def _admit(self) -> None:
        for sequence in self.admission.admit(self._version_now, num_running=len(self._running)):
            if not sequence.has_run:
                sequence.has_run = True
                self.versions.begin(sequence)
            self._running[sequence.number] = sequence
            self._ready.add(sequence)

    def _version_now(self, sequence: Sequence) -> int:
        version = self.versions.of(sequence)
        return self.newest_version if version is None else version

    def _form(self, version: int | None) -> Rows:
        """The rows of the next iteration: at most its share of the decoding sequences, in flight or not."""

        def is_wanted(each: int | None) -> bool:
            return self.versions.resolved(each) == version

        num_decoding = len(self._running) - self._ready.num_prompts
        return form_iteration(
            self._ready.decodes(is_wanted),
            self._ready.prompts(is_wanted),
            most_decodes=max(1, -(-num_decoding // self._num_in_flight)),
            token_budget=self._token_budget,
        )

    def _with_blocks(self, rows: Rows) -> Rows:
        """The rows that have room in the cache, which the youngest sequences make where there is none."""
        if sum(self.blocks.num_missing(*row) for row in rows) <= self.blocks.num_free:
            with_blocks = [row for row in rows if self.blocks.grow(*row)]
            for sequence, count in with_blocks if self._num_rows_ahead else ():
                self.blocks.grow(sequence, count + self._num_rows_ahead)
            return with_blocks
        with_room = {
            sequence.number
            for sequence, count in sorted(rows, key=lambda row: row[0].number)
            if sequence.number in self._running and self._make_room(sequence, count)
        }
        return [row for row in rows if row[0].number in with_room]

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Give a sequence blocks for its next rows; False: there are none until others come back."""
        while not self.blocks.grow(sequence, count):
            younger = [each for number, each in self._running.items() if number > sequence.number]
            idle = [each for each in younger if not each.num_in_flight and not each.is_unscored]
            if younger and not idle:
                return False
            self._preempt(max(idle, key=lambda each: each.number, default=sequence))
            if sequence.number not in self._running:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence out of the cache. It has nothing in flight."""
        self._ready.remove(sequence)
        del self._running[sequence.number]
        self.blocks.release(sequence)
        self.admission.put_back(sequence)
        self.num_preempted += 1

    def _next_scoring(self) -> FirstRows | None:
        """An iteration of deferrable tasks, when no other one of them is under way."""
        if self._scoring is not None:
            return None
        rows = form_scoring(self._deferrable.values(), token_budget=self._token_budget)
        return self._start(rows, rows[0][0].version, deferrable=True) if rows else None

    def _start(self, rows: Rows, version: int | None, *, deferrable: bool = False) -> FirstRows:
        iteration = Iteration(
            number=self._next_number,
            sequences=tuple(sequence.number for sequence, _ in rows),
            starts=tuple(sequence.num_cached for sequence, _ in rows),
            counts=tuple(count for _, count in rows),
            produces=tuple(count == sequence.num_left for sequence, count in rows),
            begins=tuple(sequence.as_start() for sequence, _ in rows if not sequence.has_begun),
            new_blocks=new_blocks_of(rows),
            left=tuple(self._left),
            version=version,
            deferrable=deferrable,
            training_turn=min(sequence.task.pace.training_turn for sequence, _ in rows),
        )
        tokens = tuple(chain.from_iterable(sequence.next_tokens(count) for sequence, count in rows))
        self._next_number += 1
        self._left.clear()
        self._in_flight[iteration.number] = iteration
        if deferrable:
            self._scoring = iteration.number
        for sequence, count in rows:
            self._sent(sequence, count)
        return FirstRows(iteration, tokens)

    def _sent(self, sequence: Sequence, count: int) -> None:
        """Note that the sequence's next rows are on their way."""
        if count == sequence.num_left:
            self._ready.remove(sequence)
        sequence.num_cached += count
        sequence.num_in_flight += 1
        sequence.has_begun = True
        sequence.num_known_blocks = len(sequence.held.blocks)

    def finish_iteration(self, done: IterationDone) -> list[InferenceTask]:
        """Take in an iteration that has left the last stage; returns the tasks that it completed.

        Iterations and sequences that are no longer known are ignored.
        """
        iteration = self._land(done.iteration)
        if iteration is None:
            return []
        tokens = {sampled.sequence: sampled for sampled in done.tokens}
        completed = []
        columns = (iteration.sequences, iteration.starts, iteration.counts, iteration.produces)
        for number, start, count, produces in zip(*columns, strict=True):
            sequence = self._running.get(number) or self._deferrable.get(number)
            sampled = tokens.get(number)
            if sequence is None or (produces and sampled is None):
                continue  # it was removed meanwhile, or it has failed
            if self._came_back(sequence, start + count, sampled, done.weights_version):
                completed.append(sequence.task)
        return completed

    def _came_back(
        self, sequence: Sequence, num_rows: int, sampled: SampledToken | None, version: int | None
    ) -> bool:
        """Note that a sequence's first `num_rows` have gone through all stages; whether it is over."""
        sequence.num_in_flight -= 1
        is_put_off = sampled is not None and sampled.token is None and not sampled.finished
        if not sequence.task.deferrable:  # a row that comes again is written again
            self.blocks.computed(sequence, num_rows - is_put_off, version)
        if sampled is None:
            return False
        if sampled.finished:
            self._end(sequence)
            return True
        if sampled.token is None:
            sequence.num_cached -= 1
        else:
            sequence.generated.append(sampled.token)
        self._ready.add(sequence)
        return False

    def _land(self, number: int) -> Iteration | None:
        """An iteration is no longer in flight; None: it was not."""
        if self._scoring == number:
            self._scoring = None
        return self._in_flight.pop(number, None)

    def lose_iteration(self, number: int) -> list[InferenceTask]:
        """Take in that an iteration was lost: remove and return the tasks that were in it."""
        iteration = self._land(number)
        if iteration is None:
            return []
        self._left.update(dict.fromkeys(iteration.left))
        everyone = self._running | self._deferrable
        return self._remove_all(everyone[each] for each in iteration.sequences if each in everyone)

    def lose(self, task_ids: Iterable[str]) -> list[InferenceTask]:
        """Remove and return the tasks among these that are here."""
        return self._remove_all(self._here[task_id] for task_id in task_ids if task_id in self._here)

    def remove(self, task_id: str) -> bool:
        """Forget a sequence; False when it is not here."""
        return bool(self.lose((task_id,)))

    def expired(self, now_s: float) -> list[InferenceTask]:
        """Remove and return the tasks that are past their deadline."""
        return self._remove_all(each for each in self._here.values() if each.deadline_s <= now_s)

    def restored(self, version: int, rule: ServingRule, *, is_same: bool = True) -> list[InferenceTask]:
        """Note that the stages serve only these weights: remove and return the tasks that want others.

        `is_same`: the weights that had that number until now, if any, were the same.
        """
        goes_on = (None, version) if is_same else (None,)
        lost = self._remove_all(each for each in self._here.values() if each.version not in goes_on)
        self.blocks.forget(self._running.values())
        ready = [each for each in self._running.values() if self._ready.remove(each)]
        self.versions.restored(version, rule, [each for each in self._here.values() if each.has_run])
        for sequence in ready:
            self._ready.add(sequence)
        return lost

    def reset(self) -> list[InferenceTask]:
        """Remove and return everything after the pipeline broke; nothing is in flight any more."""
        for iteration in self._in_flight.values():
            self._left.update(dict.fromkeys(iteration.left))
        self._in_flight.clear()
        self._scoring = None
        removed = self._remove_all(self._here.values())
        self.blocks.forget(())
        return removed

    def _remove_all(self, sequences: Iterable[Sequence]) -> list[InferenceTask]:
        removed = list(sequences)
        for sequence in removed:
            self._end(sequence)
        return [sequence.task for sequence in removed]

    def _end(self, sequence: Sequence) -> None:
        """The sequence is over, wherever it was: its blocks are free."""
        del self._here[sequence.task.task_id]
        if self._running.pop(sequence.number, None) is not None:
            self._ready.remove(sequence)
            self.blocks.release(sequence)
        elif self._deferrable.pop(sequence.number, None) is None:
            self.admission.remove(sequence)
        if sequence.has_run:
            self.versions.end(sequence)
        if sequence.has_begun:
            self._left[sequence.number] = None
