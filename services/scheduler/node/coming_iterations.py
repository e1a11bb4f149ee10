"""The iterations of a prediction: when each enters, and what comes after it. Pure.

At most one per stage is in flight. Where all of these slots are taken, an iteration waits for the next one;
where none waits, one of decodes alone enters.
"""

from services.scheduler.node.devices import Devices
from services.scheduler.node.known_work import ITERATION, Iteration, KnownWork, Op
from services.scheduler.node.prediction import Entry


class ComingIterations:
    """Iterations in flight, with or without a slot, and those of decodes alone that will be formed."""

    def __init__(self, known: KnownWork, now_s: float, devices: Devices) -> None:
        self.ends_s = [now_s] * known.num_stages
        """By stage: when the last one so far was over."""
        self.first_tokens_s: dict[str, float] = {}
        """When each waiting prompt is through the last stage."""
        self.slot_s = float("inf")
        """When a slot is free that nobody here takes."""
        self.last_entry_s = now_s
        self.last_starts_s: list[float] = []
        """By stage, of the last one that waits for a slot."""
        self.decode_entries: list[Entry] = []
        self._known = known
        self._devices = devices
        self._last = known.num_stages - 1
        num_free = max(0, known.num_stages - len(known.in_flight))
        self._waiting = known.formed[num_free:]
        """Without a slot, in order."""
        self._next_waiting = 0
        self._num_untaken = max(0, len(known.in_flight) - known.num_stages)
        """Iterations in flight whose slots others have taken already: nobody has told yet that they left."""
        self._num_due = known.num_decoding
        """Decoding sequences that are in no iteration; below 0 where several are known to have the same."""
        self._num_decode_iterations = known.num_decode_iterations
        """Iterations of decodes alone that may still enter."""
        self._begin(known.formed[:num_free])
        if self._waiting:
            self.last_starts_s = devices.starts_of(self._waiting[-1])
        if len(known.formed) < num_free:
            self.slot_s = devices.from_s[0]

    def end(self, iteration: Iteration, stage: int, at_s: float) -> None:
        """Let an iteration that a stage has done go on to the next one, or leave."""
        self.ends_s[stage] = at_s
        if stage < self._last:
            self._come(iteration, stage + 1, at_s + self._known.hop_between_s(stage, stage + 1))
        else:
            self._leave(iteration, at_s)

    def _begin(self, entering: list[Iteration]) -> None:
        known = self._known
        running = {id(each.op.flow) for each in known.running if each is not None}
        for iteration in known.in_flight:
            if id(iteration) not in running:
                self._come(iteration, iteration.stage, iteration.ready_s)
        self._num_due -= sum(iteration.num_decodes for iteration in (*known.in_flight, *entering))
        for iteration in entering:
            self._come(iteration, 0, iteration.ready_s)

    def _come(self, iteration: Iteration, stage: int, at_s: float) -> None:
        self._devices.arrive(at_s, stage, Op(ITERATION, iteration, 0, iteration.durations_s[stage]))

    def _leave(self, done: Iteration, at_s: float) -> None:
        for task_id in done.completes:
            self.first_tokens_s[task_id] = at_s
        self._num_due += done.num_decodes
        if self._num_untaken:
            self._num_untaken -= 1
        else:
            self._give_slot(at_s + self._known.hop_between_s(self._last, 0))

    def _give_slot(self, at_s: float) -> None:
        """Give a slot to the next iteration that waits for one, or to one of decodes alone."""
        waiting = self._waiting[self._next_waiting] if self._next_waiting < len(self._waiting) else None
        may_decode = self._num_decode_iterations > 0 and self._num_due > 0
        if waiting is not None and (waiting.ready_s <= at_s or not may_decode):
            self.last_entry_s = max(at_s, waiting.ready_s)
            self._num_due -= waiting.num_decodes
            self._come(waiting, 0, self.last_entry_s)
            self._next_waiting += 1
        elif may_decode:
            self._decode(at_s)
        else:
            self.slot_s = min(self.slot_s, at_s)

    def _decode(self, at_s: float) -> None:
        """Let an iteration of decodes alone enter."""
        known = self._known
        num_decodes = min(self._num_due, known.joins.num_sequences)
        iteration = Iteration(known.joins, known.joins_s, num_decodes=num_decodes)
        self._num_due -= num_decodes
        self._num_decode_iterations -= 1
        if not self._num_decode_iterations:
            self._devices.let_decodes_between()
        if self._next_waiting == len(self._waiting):
            self.decode_entries.append(Entry(at_s, iteration, self._devices.starts_of(iteration)))
        self._come(iteration, 0, at_s)
