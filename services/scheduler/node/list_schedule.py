"""The node's future with all known work, if nothing more comes: list scheduling, op by op. Pure.

Rules, as stage workers follow them: a device does one op at a time, of whichever of its stages; inference
goes first, then backwards, then training forwards, which take turns with backwards (discipline `slo_first`;
its patience with training, half a second, is left out). Training ops stand aside for an iteration between
two of their slices (shared/slices.py); all else goes on to its end. Stage 0 orders all stages to step
when it has done a batch's last backward; steps go before backwards. At most one iteration per stage is in
flight, and as many microbatches as the schedule lets in.

Iterations of decodes alone enter wherever no prompt waits for the slot; but only the next few, because there
would be hundreds. After these decoding sequences are no ops here, and come in between: after each training
op, and each turn of one, a device gives `decode_gap_s` to them.
"""

from heapq import heappop, heappush

from services.scheduler.node.known_work import (
    BACKWARD,
    FORWARD,
    ITERATION,
    STEP,
    Batch,
    Iteration,
    KnownWork,
    Op,
    Running,
)
from services.scheduler.node.prediction import Entry, Prediction
from services.scheduler.node.slices_of_ops import RunningInSlices, cut_s, next_on_device

SLACK_S = 1e-9
_END, _CUT, _WAKE = 8, 9, 10
"""At one instant arrivals come first, then ends: whoever is there may be chosen."""


def predict(known: KnownWork, now_s: float) -> Prediction:
    """Predict the ops of everything known, from `now_s` on."""
    return _ListSchedule(known, now_s).prediction()


class _ListSchedule:
    """A little discrete-event simulation: arrivals at stages, and ends of ops."""

    def __init__(self, known: KnownWork, now_s: float) -> None:
        stages = range(known.num_stages)
        self._known = known
        self._now_s = now_s
        self._from_s = [min(told_s, now_s) for told_s in known.told_s] or [now_s for _ in stages]
        """By stage: nothing begins or ends there before."""
        self._device_of = list(known.devices) or list(stages)
        """By stage. What follows by device has a place for each stage, that of its first one."""
        self._last = known.num_stages - 1
        self._events: list[tuple[float, int, int, int, Op | None, float]] = []
        """(time, rank, tie, stage, op, since when it waits)."""
        self._tie = 0
        self._queues: list[list[tuple[int, float, int, int, Op]]] = [[] for _ in stages]
        """By device: (rank, since when it waits, tie, stage, op), of all else."""
        self._forwards: list[list[tuple[float, int, int, Op]]] = [[] for _ in stages]
        """By device: (since when it waits, tie, stage, op), of training forwards only."""
        self._after_backward = list(known.after_backward) or [False for _ in stages]
        self._num_running = [0 for _ in stages]
        """By device; several only where nobody has told yet that the earlier ones are over."""
        self._sliced: list[RunningInSlices | None] = [None for _ in stages]
        """By device: the op that runs there, if it gives way."""
        self._aside: list[tuple[int, Op] | None] = [None for _ in stages]
        """By device: (stage, the rest of its op that stands aside)."""
        self._void_ends: set[int] = set()
        """Ties of the ends of ops that stood aside before."""
        self._training_from_s = list(self._from_s)
        self._ops: list[list[Op]] = [[] for _ in stages]
        self._starts_s: list[list[float]] = [[] for _ in stages]
        self._ends_s: list[list[float]] = [[] for _ in stages]
        self._inference_ends_s = [now_s for _ in stages]
        self._first_tokens_s: dict[str, float] = {}
        self._waiting: list[Iteration] = []
        """Without a slot, in order."""
        self._next_waiting = 0
        self._num_untaken = 0
        """Iterations in flight whose slots others have taken already: nobody has told yet that they left."""
        self._num_due = known.num_decoding
        """Decoding sequences that are in no iteration; below 0 where several are known to have the same."""
        self._num_decode_iterations = known.num_decode_iterations
        """Iterations of decodes alone that may still enter."""
        self._decode_entries: list[Entry] = []
        self._last_entry_s = now_s
        self._last_starts_s: list[float] = []
        self._starts_s_of: dict[int, list[float]] = {}
        """By iteration, of those that a newcomer may join."""
        self._slot_s = self._feed_s = float("inf")
        self._unfed: list[tuple[int, Batch, int]] = []
        """(place of the batch, batch, microbatch) that stage 0 holds back, in order."""
        self._next_unfed = 0
        self._is_at_stage_0 = False
        """A microbatch has entered, and is not through stage 0's forward."""
        self._num_in_flight = 0
        """Microbatches that have entered, and are not through stage 0's backward."""
        self._backwards_left: dict[str, int] = {}
        """For each batch on stage 0, the backwards that the last stage still has to do."""
        self._steps_left: dict[str, int] = {}
        self._stepped_s: dict[str, float] = {}
        """For each batch, when stage 0 hears of the last one of its steps so far."""
        self._num_applied = 0
        self._begin_running()
        self._begin_iterations()
        self._begin_training()

    def prediction(self) -> Prediction:
        events, num_running = self._events, self._num_running
        while events:
            at_s, rank, tie, stage, op, since_s = heappop(events)
            device = self._device_of[stage]
            if rank < _END:
                assert op is not None
                if rank == FORWARD:
                    heappush(self._forwards[device], (since_s, tie, stage, op))
                else:
                    heappush(self._queues[device], (rank, since_s, tie, stage, op))
                if rank == BACKWARD and self._after_backward[device]:  # a forward of this moment goes first
                    self._wake(at_s, stage)
                    continue
                if rank == ITERATION:
                    self._plan_cut(device, at_s)
            elif rank == _CUT:
                self._stand_aside(device, at_s)
            elif tie in self._void_ends:
                continue
            elif op is not None:
                num_running[device] -= 1
                self._sliced[device] = None
                self._go_on(device, at_s, op.duration_s)
                self._follow(op, stage, at_s)
                if stage == 0:  # what follows comes in this very moment, and may go first
                    self._wake(at_s, stage)
                    continue
            if not num_running[device]:
                self._start_next(device, at_s)
        return Prediction(
            at_s=self._now_s,
            ops=self._ops,
            starts_s=self._starts_s,
            ends_s=self._ends_s,
            inference_ends_s=self._inference_ends_s,
            stage_ends_s=[ends[-1] if ends else self._now_s for ends in self._ends_s],
            slot_s=self._slot_s,
            feed_s=self._feed_s,
            first_tokens_s=self._first_tokens_s,
            last_entry_s=self._last_entry_s,
            last_starts_s=self._last_starts_s,
            decode_entries=self._decode_entries,
            known=self._known,
        )

    # The present

    def _begin_running(self) -> None:
        known, from_s = self._known, self._from_s
        for stage, running in enumerate(known.running):
            if running is None:
                continue
            after = next_on_device(known, stage)
            end_s = running.start_s + running.op.duration_s
            if after is not None and after.start_s < end_s:
                if after.op.kind == ITERATION and known.num_slices_of(stage, running.op.kind) > 1:
                    self._stood_aside(stage, running, after.start_s)
                    continue
                end_s = after.start_s
            self._record(stage, running.op, running.start_s, max(from_s[stage], end_s), running.turn_until_s)
        for stage, rest in enumerate(known.aside):
            if rest is not None:
                self._aside[self._device_of[stage]] = (stage, rest)
        for device, at_s in enumerate(from_s):
            self._go_on(device, at_s, 0.0)

    def _stood_aside(self, stage: int, running: Running, at_s: float) -> None:
        """Note that an op stands aside since another stage's iteration has begun on its device."""
        done_s = at_s - running.start_s
        rest_s = running.op.duration_s - done_s
        self._ops[stage].append(running.op._replace(duration_s=done_s, rest_s=rest_s))
        self._starts_s[stage].append(running.start_s)
        self._ends_s[stage].append(at_s)
        rest = running.op._replace(duration_s=rest_s, done_s=running.op.done_s + done_s)
        self._aside[self._device_of[stage]] = (stage, rest)

    def _begin_iterations(self) -> None:
        known, from_s = self._known, self._from_s
        running = {id(each.op.flow) for each in known.running if each is not None}
        for iteration in known.in_flight:
            if id(iteration) not in running:
                self._iterate(iteration, iteration.stage, iteration.ready_s)
        num_free = max(0, known.num_stages - len(known.in_flight))
        entered = [*known.in_flight, *known.formed[:num_free]]
        self._num_due -= sum(iteration.num_decodes for iteration in entered)
        self._num_untaken = max(0, len(known.in_flight) - known.num_stages)
        for iteration in known.formed[:num_free]:
            self._iterate(iteration, 0, iteration.ready_s)
        self._waiting = known.formed[num_free:]
        if self._waiting:
            self._starts_s_of[id(self._waiting[-1])] = self._last_starts_s
        if len(known.formed) < num_free:
            self._slot_s = from_s[0]

    def _begin_training(self) -> None:
        for place, batch in enumerate(self._known.batches):
            for index, num_passes in enumerate(batch.passes):
                self._begin_microbatch(place, batch, index, num_passes)
            self._begin_steps(batch)
        self._feed(self._known.feed_s)

    def _begin_microbatch(self, place: int, batch: Batch, index: int, num_passes: int) -> None:
        ops = self._known.begun(batch)
        is_running = any(op.kind != STEP and op.microbatch == index for _, op in ops)
        if num_passes == 0 and not is_running:
            self._unfed.append((place, batch, index))
        elif num_passes < 2 * self._last + 1:
            self._num_in_flight += 1
            self._is_at_stage_0 |= num_passes == 0
            if not is_running:
                self._pass(batch, index, num_passes, batch.ready_s[index])

    def _begin_steps(self, batch: Batch) -> None:
        self._steps_left[batch.batch_id] = self._known.num_stages - len(batch.stepped)
        self._num_applied += self._steps_left[batch.batch_id] == 0
        left = sum(num_passes <= 2 * self._last for num_passes in batch.passes)
        self._backwards_left[batch.batch_id] = left
        stepping = {stage for stage, op in self._known.begun(batch) if op.kind == STEP}
        for stage in range(self._known.num_stages):
            if left == 0 and stage not in batch.stepped | stepping:
                self._step(batch, stage, self._heard_s(stage, max(batch.ready_s)))

    # The future

    def _arrive(self, at_s: float, stage: int, op: Op) -> None:
        """An op that has waited for long is first noticed when something may begin there."""
        self._tie += 1
        noticed_s = max(at_s, self._from_s[stage])
        heappush(self._events, (noticed_s, op.kind, self._tie, stage, op, at_s))

    def _wake(self, at_s: float, stage: int) -> None:
        self._tie += 1
        heappush(self._events, (at_s, _WAKE, self._tie, stage, None, at_s))

    def _start_next(self, device: int, at_s: float) -> None:
        queue, forwards = self._queues[device], self._forwards[device]
        if not queue and not forwards:
            return
        kind = queue[0][0] if queue else FORWARD
        if kind == BACKWARD and forwards and self._after_backward[device]:
            kind = FORWARD
        if kind != ITERATION and at_s < self._training_from_s[device]:
            self._wake(self._training_from_s[device], device)
            return
        stage, op = heappop(forwards)[2:] if kind == FORWARD else heappop(queue)[3:]
        if kind != ITERATION:
            op = op._replace(duration_s=op.duration_s + self._decodes_within_s(device, op, at_s))
        self._record(stage, op, at_s, at_s + op.duration_s)

    def _decodes_within_s(self, device: int, op: Op, at_s: float) -> float:
        """Seconds that decoding takes of the device between the turns of an op that begins now."""
        known = self._known
        is_without = self._num_decode_iterations or not known.decode_gap_s or at_s >= known.decode_until_s
        if is_without or known.num_slices_of(device, op.kind) == 1:
            return 0.0
        slice_s = op.duration_s / known.num_slices_of(device, op.kind)
        turn_s = max(slice_s, known.training_turn * known.decode_s[device])
        return known.decode_gap_s[device] * (op.duration_s // turn_s)

    def _plan_cut(self, device: int, at_s: float) -> None:
        """An iteration waits: have the op that runs stand aside at the end of a slice."""
        sliced = self._sliced[device]
        if sliced is None or sliced.is_cut or self._num_running[device] > 1:
            return
        wanted_s = max(at_s, sliced.turn_until_s)
        aside_s = max(at_s, cut_s(self._known, sliced.stage, sliced.op, sliced.start_s, wanted_s))
        if aside_s < sliced.end_s - SLACK_S:
            sliced.is_cut = True
            self._tie += 1
            heappush(self._events, (aside_s, _CUT, self._tie, sliced.stage, None, at_s))

    def _stand_aside(self, device: int, at_s: float) -> None:
        sliced = self._sliced[device]
        assert sliced is not None, "nothing else ends it"
        stage, op, done_s = sliced.stage, sliced.op, at_s - sliced.start_s
        rest_s = op.duration_s - done_s
        self._void_ends.add(sliced.tie)
        self._ops[stage][-1] = op._replace(duration_s=done_s, rest_s=rest_s)
        self._ends_s[stage][-1] = at_s
        self._aside[device] = (stage, op._replace(duration_s=rest_s, done_s=op.done_s + done_s))
        self._sliced[device] = None
        self._num_running[device] -= 1

    def _go_on(self, device: int, at_s: float, given_way_s: float) -> None:
        """Let the op go on that stands aside, if there is one and nothing runs."""
        aside = self._aside[device]
        if aside is None or self._num_running[device]:
            return
        stage, op = aside
        self._aside[device] = None
        self._record(stage, op, at_s, at_s + op.duration_s, at_s + self._known.training_turn * given_way_s)
        if self._queues[device] and self._queues[device][0][0] == ITERATION:
            self._plan_cut(device, at_s)

    def _record(self, stage: int, op: Op, start_s: float, end_s: float, turn_until_s: float = 0.0) -> None:
        self._ops[stage].append(op)
        self._starts_s[stage].append(start_s)
        self._ends_s[stage].append(end_s)
        if (starts_s := self._starts_s_of.get(id(op.flow))) is not None:
            starts_s.append(start_s)
        device = self._device_of[stage]
        self._num_running[device] += 1
        if op.kind in (FORWARD, BACKWARD):
            self._after_backward[device] = op.kind == BACKWARD
        self._tie += 1
        heappush(self._events, (end_s, _END, self._tie, stage, op, end_s))
        if self._known.num_slices_of(stage, op.kind) > 1:
            self._sliced[device] = RunningInSlices(stage, op, start_s, end_s, self._tie, turn_until_s)

    def _follow(self, op: Op, stage: int, at_s: float) -> None:
        flow = op.flow
        if isinstance(flow, Iteration):
            self._inference_ends_s[stage] = at_s
            if stage < self._last:
                self._iterate(flow, stage + 1, at_s + self._known.hop_between_s(stage, stage + 1))
            else:
                self._free_slot(flow, at_s)
            return
        if flow is None:
            return
        gaps_s, device = self._known.decode_gap_s, self._device_of[stage]
        if gaps_s and at_s < self._known.decode_until_s and not self._num_decode_iterations:
            self._training_from_s[device] = at_s + gaps_s[device]
        if op.kind == STEP:
            self._stepped(flow, stage, at_s)
        else:
            self._passed(flow, op, stage, at_s)

    def _iterate(self, iteration: Iteration, stage: int, at_s: float) -> None:
        self._arrive(at_s, stage, Op(ITERATION, iteration, 0, iteration.durations_s[stage]))

    def _free_slot(self, done: Iteration, at_s: float) -> None:
        for task_id in done.completes:
            self._first_tokens_s[task_id] = at_s
        self._num_due += done.num_decodes
        if self._num_untaken:
            self._num_untaken -= 1
            return
        free_s = self._heard_s(self._last, at_s)
        waiting = self._waiting[self._next_waiting] if self._next_waiting < len(self._waiting) else None
        may_decode = self._num_decode_iterations > 0 and self._num_due > 0
        if waiting is not None and (waiting.ready_s <= free_s or not may_decode):
            self._last_entry_s = max(free_s, waiting.ready_s)
            self._num_due -= waiting.num_decodes
            self._iterate(waiting, 0, self._last_entry_s)
            self._next_waiting += 1
        elif may_decode:
            self._decode(free_s)
        else:
            self._slot_s = min(self._slot_s, free_s)

    def _decode(self, at_s: float) -> None:
        """Let an iteration of decodes alone enter."""
        known = self._known
        num_decodes = min(self._num_due, known.joins.num_sequences)
        iteration = Iteration(known.joins, known.joins_s, num_decodes=num_decodes)
        self._num_decode_iterations -= 1
        self._num_due -= num_decodes
        if self._next_waiting == len(self._waiting):
            starts_s = self._starts_s_of[id(iteration)] = []
            self._decode_entries.append(Entry(at_s, iteration, starts_s))
        self._iterate(iteration, 0, at_s)

    def _pass(self, batch: Batch, index: int, num_passes: int, at_s: float) -> None:
        """Send a microbatch to the stage of its next pass."""
        last = self._last
        if num_passes <= last:
            self._arrive(at_s, num_passes, Op(FORWARD, batch, index, batch.forward_s[index][num_passes]))
        else:
            stage = 2 * last - num_passes
            self._arrive(at_s, stage, Op(BACKWARD, batch, index, batch.backward_s[index][stage]))

    def _passed(self, batch: Batch, op: Op, stage: int, at_s: float) -> None:
        last = self._last
        is_backward = op.kind == BACKWARD
        num_passes = 2 * last + 1 - stage if is_backward else stage + 1
        if num_passes < 2 * last + 1:
            to_stage = min(num_passes, 2 * last - num_passes)
            sent_s = self._known.hop_between_s(stage, to_stage)
            self._pass(batch, op.microbatch, num_passes, at_s + sent_s)
        else:
            self._num_in_flight -= 1
        if num_passes == 2 * last + 1:
            self._backwards_left[batch.batch_id] -= 1
            if self._backwards_left[batch.batch_id] == 0:
                for each in range(self._known.num_stages):
                    self._step(batch, each, self._heard_s(each, at_s))
        if stage == 0:
            if not is_backward:
                self._is_at_stage_0 = False
            self._feed(at_s)

    def _heard_s(self, stage: int, at_s: float) -> float:
        """When a stage hears of what is on stage 0, or the other way round."""
        return at_s + self._known.hop_between_s(stage, 0)

    def _step(self, batch: Batch, stage: int, at_s: float) -> None:
        self._arrive(at_s, stage, Op(STEP, batch, 0, batch.step_s[stage]))

    def _stepped(self, batch: Batch, stage: int, at_s: float) -> None:
        """Stage 0 has heard of all steps when it hears of the last one."""
        self._steps_left[batch.batch_id] -= 1
        self._stepped_s[batch.batch_id] = max(
            self._stepped_s.get(batch.batch_id, 0.0), self._heard_s(stage, at_s)
        )
        if self._steps_left[batch.batch_id] == 0:
            self._num_applied += 1
            self._feed(self._stepped_s[batch.batch_id])

    def _feed(self, at_s: float) -> None:
        """Let the next microbatch enter, if it may."""
        known = self._known
        if self._is_at_stage_0 or self._num_in_flight >= known.max_in_flight:
            return
        if self._next_unfed == len(self._unfed):
            if not (known.flushes and self._num_applied < len(known.batches)):
                self._feed_s = min(self._feed_s, max(at_s, self._from_s[0]))
            return
        place, batch, index = self._unfed[self._next_unfed]
        if known.flushes and place > self._num_applied:
            return
        self._next_unfed += 1
        self._is_at_stage_0, self._num_in_flight = True, self._num_in_flight + 1
        self._pass(batch, index, 0, max(at_s, batch.ready_s[index]))
