"""The work that a node has before it, as far as the scheduler knows: the terms of predictions. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from sys import maxsize
from typing import NamedTuple

from services.scheduler.costs import Costs
from shared.profiles.times import NO_WORK, Work
from shared.slices import TRAINING_TURN, NumSlices

ITERATION, STEP, BACKWARD, FORWARD = range(4)
"""In the order in which a stage prefers them."""


BACKWARD_SHARE = 2 / 3
"""Share of the backward in the last stage's op, which does both passes: a backward costs two forwards."""
NEAR_HOP_S = 1e-7
"""Between stages of one process: enough for the device to take what waits there first."""


@dataclass(slots=True, eq=False)
class Iteration:
    """Rows that are under way through the stages, or will be."""

    work: Work
    durations_s: Sequence[float]
    """By stage."""
    completes: tuple[str, ...] = ()
    """Tasks whose prompt it completes."""
    num_decodes: int = 0
    """Decoding sequences in it."""
    stage: int = 0
    """Where it runs or waits."""
    ready_s: float = 0.0
    """When it is there."""


@dataclass(slots=True, eq=False)
class Batch:
    """A training batch. A microbatch passes S times forward, then S - 1 times backward: the last stage does
    both in one.
    """

    batch_id: str
    forward_s: Sequence[Sequence[float]]
    """By microbatch and stage; on the last stage with its backward."""
    backward_s: Sequence[Sequence[float]]
    step_s: Sequence[float]
    """By stage."""
    passes: list[int]
    """How many each microbatch has behind it."""
    ready_s: list[float]
    """When each microbatch is where its next pass runs."""
    stepped: set[int] = field(default_factory=set)
    """Stages that have stepped."""

    def slice_s(self, stage: int, num_slices: NumSlices) -> float:
        """The longest that an iteration waits on a stage for a pass of it, or its step, to give way."""
        is_last = stage == len(self.step_s) - 1
        forward_share = max(BACKWARD_SHARE, 1 - BACKWARD_SHARE) if is_last else 1.0
        passes_s = [forward_share * forward_s[stage] for forward_s in self.forward_s]
        passes_s += [backward_s[stage] for backward_s in self.backward_s]
        slices_s = [pass_s / num_slices.of_pass for pass_s in passes_s]
        return max([*slices_s, self.step_s[stage] / num_slices.of_step])


def durations_of(work: Work, costs: Costs, num_stages: int) -> list[float]:
    """Durations of an iteration, by stage."""
    return [costs.iteration_s(stage, work) for stage in range(num_stages)]


def batch_of(
    batch_id: str, microbatches: Sequence[Work], costs: Costs, num_stages: int, *, ready_s: float
) -> Batch:
    """A batch of which nothing has run yet, and which can be at stage 0 from `ready_s` on."""
    stages = range(num_stages)
    return Batch(
        batch_id,
        [[costs.forward_s(stage, work) for stage in stages] for work in microbatches],
        [[costs.backward_s(stage, work) for stage in stages] for work in microbatches],
        [costs.step_s(stage) for stage in stages],
        passes=[0] * len(microbatches),
        ready_s=[ready_s] * len(microbatches),
    )


class Op(NamedTuple):
    """A piece of work that a stage does without interruption: an op, or what it does of one before it stands
    aside or after that.
    """

    kind: int
    flow: Iteration | Batch | None
    """The iteration or batch that it is a part of; None when that has ended."""
    microbatch: int
    """Its place in the batch; 0 otherwise."""
    duration_s: float
    done_s: float = 0.0
    """Seconds of the op that are done before this piece."""
    rest_s: float = 0.0
    """Seconds of it that are left after this piece."""


class Running(NamedTuple):
    """The op that a stage does now."""

    op: Op
    start_s: float
    """As if it had run without a break from then on."""
    turn_until_s: float = 0.0
    """It does not stand aside before."""


@dataclass(slots=True, kw_only=True)
class KnownWork:
    """All that a node has before it."""

    num_stages: int
    hop_s: float
    running: list[Running | None]
    """By stage."""
    aside: Sequence[Op | None] = ()
    """By stage: what is left of the op that stands aside there; empty: none does."""
    num_slices: Sequence[NumSlices] = ()
    """By stage: slices of training ops, between which they give way to iterations; empty: one each."""
    training_turn: float = TRAINING_TURN
    """How long what gave way to an iteration goes on at least, in lengths of that."""
    devices: Sequence[int] = ()
    """By stage: the first stage on its device, which does one op at a time; empty: each has its own."""
    told_s: Sequence[float] = ()
    """By stage: it has told of everything that happened there before; empty: all have, up to now."""
    in_flight: list[Iteration] = field(default_factory=list)
    """Begun, and not done by the last stage; in order."""
    formed: list[Iteration] = field(default_factory=list)
    """Not begun, in order: each enters when fewer than one per stage are in flight."""
    after_backward: Sequence[bool] = ()
    """By device: the last microbatch there went backward, so that a forward goes first; empty: none did."""
    batches: list[Batch] = field(default_factory=list)
    """In the order of their placement."""
    feed_s: float = 0.0
    """When the next microbatch can be at stage 0 at the earliest."""
    max_in_flight: int = maxsize
    """Microbatches."""
    flushes: bool = False
    """Whether a batch enters only when the one before it is applied."""
    decode_gap_s: Sequence[float] = ()
    """By device: what decoding sequences take between two training ops; empty: none decode."""
    decode_s: Sequence[float] = ()
    """By device: what one iteration of decodes takes."""
    decode_until_s: float = 0.0
    joins: Work = NO_WORK
    """Rows that a newcomer's iteration also carries when it has to wait for a slot: its share of decodes."""
    joins_s: Sequence[float] = ()
    """By stage: what an iteration of these alone takes."""
    num_decoding: int = 0
    """Decoding sequences, in an iteration or not."""
    num_decode_iterations: int = 0
    """Iterations of decodes alone that are foreseen."""

    def begun(self, batch: Batch) -> list[tuple[int, Op]]:
        """(stage, op) of all ops of a batch that run, or stand aside."""
        running = [(stage, each.op) for stage, each in enumerate(self.running) if each is not None]
        aside = [(stage, op) for stage, op in enumerate(self.aside) if op is not None]
        return [(stage, op) for stage, op in running + aside if op.flow is batch]

    def num_slices_of(self, stage: int, kind: int) -> int:
        """Slices of an op of that kind on a stage; 1: it stands aside for nothing."""
        if kind == ITERATION or not self.num_slices:
            return 1
        cuts = self.num_slices[stage]
        return cuts.of_step if kind == STEP else cuts.of_pass

    def hop_between_s(self, stage: int, other: int) -> float:
        """Seconds for a message: hardly any where one process holds both, as it does those of one device."""
        if stage == other:
            return 0.0
        is_near = bool(self.devices) and self.devices[stage] == self.devices[other]
        return NEAR_HOP_S if is_near else self.hop_s
