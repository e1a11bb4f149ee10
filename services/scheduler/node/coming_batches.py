"""The training batches of a prediction: when each microbatch enters, where it passes, and the steps. Pure.

As many microbatches are in flight as the schedule lets in. When stage 0 has done a batch's last backward, it
orders all stages to step.
"""

from services.scheduler.node.devices import Devices
from services.scheduler.node.known_work import BACKWARD, FORWARD, STEP, Batch, KnownWork, Op


class ComingBatches:
    """Batches that are on the stages, and those that stage 0 holds back."""

    def __init__(self, known: KnownWork, devices: Devices) -> None:
        self.feed_s = float("inf")
        """When a microbatch may enter that is not known here."""
        self._known = known
        self._devices = devices
        self._last = known.num_stages - 1
        self._unfed: list[tuple[int, Batch, int]] = []
        """(place of the batch, batch, microbatch) that stage 0 holds back, in order."""
        self._next_unfed = 0
        self._is_at_stage_0 = False
        """A microbatch has entered, and is not through stage 0's forward."""
        self._num_in_flight = 0
        """Microbatches that have entered, and are not through stage 0's backward."""
        self._backwards_left: dict[str, int] = {}
        """For each batch, the backwards that stage 0 still has to do."""
        self._steps_left: dict[str, int] = {}
        self._stepped_s: dict[str, float] = {}
        """For each batch, when stage 0 hears of the last one of its steps so far."""
        self._num_applied = 0
        for place, batch in enumerate(known.batches):
            for index, num_passes in enumerate(batch.passes):
                self._begin_microbatch(place, batch, index, num_passes)
            self._begin_steps(batch)
        self._feed(known.feed_s)

    def end(self, batch: Batch, op: Op, stage: int, at_s: float) -> None:
        """Let follow what an op of a batch on a stage makes possible."""
        if op.kind == STEP:
            self._stepped(batch, stage, at_s)
        else:
            self._passed(batch, op, stage, at_s)

    # The present

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

    def _pass(self, batch: Batch, index: int, num_passes: int, at_s: float) -> None:
        """Send a microbatch to the stage of its next pass."""
        last = self._last
        if num_passes <= last:
            op = Op(FORWARD, batch, index, batch.forward_s[index][num_passes])
            self._devices.arrive(at_s, num_passes, op)
        else:
            stage = 2 * last - num_passes
            self._devices.arrive(at_s, stage, Op(BACKWARD, batch, index, batch.backward_s[index][stage]))

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
        self._devices.arrive(at_s, stage, Op(STEP, batch, 0, batch.step_s[stage]))

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
                self.feed_s = min(self.feed_s, max(at_s, self._devices.from_s[0]))
            return
        place, batch, index = self._unfed[self._next_unfed]
        if known.flushes and place > self._num_applied:
            return
        self._next_unfed += 1
        self._is_at_stage_0, self._num_in_flight = True, self._num_in_flight + 1
        self._pass(batch, index, 0, max(at_s, batch.ready_s[index]))
