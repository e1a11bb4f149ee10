"""The iterations of a node: those in flight, and those that stage 0 will form from the waiting rows. Pure.

Stage 0 forms an iteration as soon as it has rows for it and fewer than one per stage are in flight. It
reports only the iterations that it runs; its queue is followed here by its own rules.
"""

from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from services.scheduler.costs import Costs
from services.scheduler.node.known_work import Iteration, durations_of
from services.scheduler.node.now_running import NowRunning
from services.scheduler.tasks import Assigned
from shared.messages.events import StageOp
from shared.profiles.times import NO_WORK, Work, work_of_rows


class _Part(NamedTuple):
    """Rows of one prompt in an iteration."""

    task: Assigned
    start: int
    num_tokens: int

    def split(self, num_tokens: int) -> tuple["_Part", "_Part | None"]:
        """The first so many rows, and the others."""
        rest = _Part(self.task, self.start + num_tokens, self.num_tokens - num_tokens)
        return (self._replace(num_tokens=num_tokens), rest) if rest.num_tokens > 0 else (self, None)

    @property
    def is_last(self) -> bool:
        return self.start + self.num_tokens == self.task.shape.prompt_tokens


@dataclass(slots=True, eq=False)
class _Formed:
    """An iteration that stage 0 has not begun."""

    iteration: Iteration
    parts: list[_Part]
    carried: Work
    """Its share of decodes."""

    @property
    def num_tokens(self) -> int:
        return self.carried.num_tokens + sum(part.num_tokens for part in self.parts)


class IterationQueue:
    """Iterations of one node, from the placement of a request to its last token."""

    def __init__(self, num_stages: int, costs: Costs, running: NowRunning) -> None:
        self.decoding: dict[str, Assigned] = {}
        """Requests whose first token is out and not their last; longest unserved first."""
        self._num_stages = num_stages
        self._costs = costs
        self._running = running
        self._num_requests = 0
        self._in_flight: dict[int, Iteration] = {}
        """By number: seen on a stage, and not done by the last."""
        self._formed: list[_Formed] = []
        """Iterations that stage 0 has or will have in its queue, in order."""
        self._last_done = -1
        """The newest iteration that the last stage has done."""

    @property
    def in_flight(self) -> list[Iteration]:
        """Begun, and not done by the last stage; in order."""
        return list(self._in_flight.values())

    @property
    def formed(self) -> list[Iteration]:
        """Not begun, in order."""
        return [formed.iteration for formed in self._formed]

    def add(self, task: Assigned, ready_s: float, *, joins: bool, waits: bool) -> None:
        """Add a prompt at stage 0: to the last iteration, which it `joins`, or in iterations of its own.

        `waits`: there is no slot for it at `ready_s`, so that its iteration takes decodes, too.
        """
        self._num_requests += 1
        start = task.shape.cached_tokens
        while start < task.shape.prompt_tokens:
            formed = self._with_room(task, ready_s, joins=joins, waits=waits)
            joins = waits  # a long prompt's pieces wait for each other
            num_tokens = min(task.shape.prompt_tokens - start, self._room(formed, task))
            formed.parts.append(_Part(task, start, num_tokens))
            self._measure(formed)
            start += num_tokens

    def remove(self, task_id: str) -> None:
        """Remove an ended request. Without any, the iterations still in flight were lost, or are nobody's."""
        self._num_requests -= 1
        self.decoding.pop(task_id, None)
        self._take_out((task_id,))
        self._drop_decodes()
        if not self._num_requests:
            for iteration in self._in_flight.values():
                self._running.orphan(iteration)
            self._in_flight.clear()
            self._formed.clear()

    def clear(self) -> None:
        """Start again with the node, and with the numbers of its iterations."""
        self._num_requests = 0
        self.decoding.clear()
        self._in_flight.clear()
        self._formed.clear()
        self._last_done = -1

    def comes(self, stage: int, op: StageOp) -> Iteration | None:
        """The iteration that has come to the stage; None when it has passed it already, or is nobody's."""
        for number in [number for number in self._in_flight if number < op.index]:
            if self._in_flight[number].stage <= stage:
                self._running.orphan(self._in_flight.pop(number))  # none overtakes another: it was lost
        iteration = self._in_flight.get(op.index)
        if iteration is None:
            if op.index <= self._last_done or not self._num_requests:
                return None
            iteration = self._in_flight[op.index] = self._begun(op)
        if iteration.stage < stage:
            self._running.passed(iteration)
            iteration.stage = stage
        return iteration if iteration.stage == stage else None

    def leaves(self, op: StageOp, tasks: list[Assigned], end_s: float) -> list[Assigned]:
        """Remove an iteration that the last stage has done; returns the `tasks` whose first token is out."""
        if self._in_flight.pop(op.index, None) is not None:  # else it is of an earlier life of stage 0
            self._last_done = max(self._last_done, op.index)
        self._take_turns(op.num_sequences - len(op.task_ids))
        through = [task for task in tasks if task.first_token_s is None]
        for task in through:
            task.first_token_s, task.num_generated = end_s, 1
            if task.shape.max_tokens > 1:
                self.decoding[task.task_id] = task
        self._give_slot(end_s + self._costs.hop_s)
        return through

    def decode_share(self) -> Work:
        """Decoding sequences that one iteration takes."""
        return self._decodes(self._num_per_iteration)

    # Slots

    def _num_slots(self, at_s: float) -> int:
        """How many of the formed iterations may enter by then."""
        is_one_leaving = self._running.leaves_by(at_s - self._costs.hop_s)
        return max(0, self._num_stages - len(self._in_flight) + is_one_leaving)

    def _room(self, formed: _Formed, task: Assigned) -> int:
        """Rows of the prompt that the iteration can still take."""
        most = task.shape.pace.rows_beside_decodes
        room = self._costs.max_iteration_tokens - formed.num_tokens
        if most is not None and formed.carried.num_tokens:
            return min(room, most - sum(part.num_tokens for part in formed.parts))
        return room

    def _with_room(self, task: Assigned, ready_s: float, *, joins: bool, waits: bool) -> _Formed:
        """The iteration for a prompt's next rows."""
        formed = self._formed
        if formed and joins and self._room(formed[-1], task) > 0:
            return formed[-1]
        carried = self.decode_share() if waits else NO_WORK
        formed.append(_Formed(Iteration(NO_WORK, (), ready_s=ready_s), [], carried))
        return formed[-1]

    def _give_slot(self, ready_s: float) -> None:
        """Give a slot to the next iteration that waits for one, with the due decodes; or to these alone."""
        place = min(self._num_slots(ready_s) - 1, len(self._formed))
        if place < 0:
            return
        carried = self._due_decodes()
        if place < len(self._formed):
            formed = self._formed[place]
            formed.carried, formed.iteration.ready_s = carried, max(ready_s, formed.iteration.ready_s)
            self._measure(formed)
        elif carried.num_tokens:
            self._formed.append(_Formed(Iteration(NO_WORK, (), ready_s=ready_s), [], carried))
            self._measure(self._formed[place])

    def _begun(self, op: StageOp) -> Iteration:
        """Note that stage 0 has begun an iteration: its rows wait no more."""
        num_rows = self._take_out(op.task_ids)
        if not op.task_ids and op.num_tokens == op.num_sequences:
            self._take_out_decodes()
        num_others, num_rows_left = op.num_sequences - len(op.task_ids), op.num_tokens - num_rows
        if num_others > len(self.decoding) or num_rows_left > num_others > 0:  # one: a longer prompt's piece
            self._take_out_piece(num_rows_left - num_others + 1)
            num_others -= 1
        work = op.work
        return Iteration(work, durations_of(work, self._costs, self._num_stages), op.task_ids, num_others)

    def _take_out(self, task_ids: tuple[str, ...]) -> int:
        """Take these tasks out of the waiting iterations; returns how many rows they had there."""
        before = sum(formed.num_tokens for formed in self._formed)
        for formed in list(self._formed) if task_ids else ():
            kept = [part for part in formed.parts if part.task.task_id not in task_ids]
            if len(kept) < len(formed.parts):
                self._keep(formed, kept)
        return before - sum(formed.num_tokens for formed in self._formed)

    def _take_out_decodes(self) -> None:
        """Take out an iteration of decodes alone."""
        alone = next((formed for formed in self._formed if not formed.parts), None)
        if alone is not None:
            self._formed.remove(alone)

    def _take_out_piece(self, num_tokens: int) -> None:
        """Note that the first prompt in line has gone on by so many rows."""
        formed = next((formed for formed in self._formed if formed.parts), None)
        if formed is not None:
            (task, start, num_rows), *others = formed.parts
            rest = _Part(task, start + num_tokens, num_rows - num_tokens)
            self._keep(formed, [rest, *others] if rest.num_tokens > 0 else others)
            self._fill_up()

    def _fill_up(self) -> None:
        """Let the rows that wait for a slot move forward to where there is room now, in their order."""
        num_free = max(0, self._num_stages - len(self._in_flight) - 1)  # one has just begun
        waiting = [formed for formed in self._formed[num_free:] if formed.parts]
        parts = deque(part for formed in waiting for part in formed.parts)
        for formed in waiting:
            formed.parts = []
            self._take_rows(formed, parts)
        while parts:  # decodes have come into the iterations meanwhile
            ready_s = self._formed[-1].iteration.ready_s
            self._formed.append(_Formed(Iteration(NO_WORK, (), ready_s=ready_s), [], self.decode_share()))
            self._take_rows(self._formed[-1], parts)

    def _take_rows(self, formed: _Formed, parts: deque[_Part]) -> None:
        """Move rows from the beginning of `parts` into an iteration without any, as far as it has room."""
        while parts and (room := self._room(formed, parts[0].task)) > 0:
            part = parts.popleft()
            while parts and parts[0].task is part.task:
                part = part._replace(num_tokens=part.num_tokens + parts.popleft().num_tokens)
            taken, rest = part.split(room)
            formed.parts.append(taken)
            if rest is not None:
                parts.appendleft(rest)
        self._keep(formed, formed.parts)

    def _keep(self, formed: _Formed, parts: list[_Part]) -> None:
        formed.parts = parts
        if parts:
            self._measure(formed)
        else:
            self._formed.remove(formed)

    def _measure(self, formed: _Formed) -> None:
        iteration = formed.iteration
        works = (work_of_rows(part.start, part.num_tokens) for part in formed.parts)
        iteration.work = sum(works, formed.carried)
        iteration.durations_s = durations_of(iteration.work, self._costs, self._num_stages)
        iteration.num_decodes = formed.carried.num_sequences
        iteration.completes = tuple(part.task.task_id for part in formed.parts if part.is_last)

    # Decodes

    @property
    def _num_per_iteration(self) -> int:
        return -(-len(self.decoding) // self._num_stages)

    def _due_decodes(self) -> Work:
        """The decoding sequences of the next iteration: its share of those that are in none."""
        num_busy = sum(each.num_decodes for each in self._in_flight.values())
        num_busy += sum(formed.carried.num_sequences for formed in self._formed)
        return self._decodes(min(self._num_per_iteration, len(self.decoding) - num_busy))

    def _decodes(self, count: int) -> Work:
        """Rows of so many decoding sequences of mean length. They always leave room for a row of a prompt."""
        count = min(count, self._costs.max_iteration_tokens - 1)
        if count <= 0 or not self.decoding:
            return NO_WORK
        num_rows = sum(task.shape.prompt_tokens + task.num_generated for task in self.decoding.values())
        num_read = count * num_rows // len(self.decoding)
        return Work(count, num_read, count, num_read)

    def _take_turns(self, count: int) -> None:
        """Add one token to so many decoding sequences, the longest unserved ones."""
        for task_id in list(islice(self.decoding, count)):
            task = self.decoding.pop(task_id)
            task.num_generated += 1
            self.decoding[task_id] = task

    def _drop_decodes(self) -> None:
        """Take out decodes: fewer sequences decode than the coming iterations had counted on."""
        left = len(self.decoding) - sum(each.num_decodes for each in self._in_flight.values())
        for formed in list(self._formed):
            count = max(0, min(left, formed.carried.num_sequences))
            left -= count
            if count == formed.carried.num_sequences:
                continue
            formed.carried = self._decodes(count)
            if formed.parts or count:
                self._measure(formed)
            else:
                self._formed.remove(formed)
