"""The interface to whatever computes for a stage worker: torch on a device, or an emulation of one.

One call at a time; tensors stay on the executor's side and are named by their references.

A call may return before the device has done its op: `took` tells how long that took, once it is known.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar

from services.stage_worker.compute.sampling.sequences import SequenceState
from shared.messages.cluster import LinkAnswer, LinkOffer, LinkPurpose
from shared.messages.inference import SequenceResult, SequenceStart, TaskFailed
from shared.messages.training import AdapterKind, Microbatch, StepOrder
from shared.messages.weights import MergeGroup, OuterStep, SavedWeights
from shared.slices import WHOLE, NumSlices
from shared.tensors.ref import TensorRef

Snapshot = TypeVar("Snapshot")
"""A copy of a stage's tensors, made or being made; opaque to the worker."""

Copied = TypeVar("Copied")
"""A stage's tensors for a mean with other nodes, and then the mean; opaque to the worker."""

Rows = Sequence[int] | TensorRef
"""The input of a stage: token ids at stage 0, activations [rows, hidden_size] after it."""


class OpTime(Protocol):
    """The time that a device takes for one run of its work."""

    def is_over(self) -> bool:
        """Whether the device has done it."""
        ...

    def wait_s(self) -> float:
        """Return the seconds that it took, once it is over; for a thread that may stand still."""
        ...


Took: TypeAlias = Sequence[OpTime]
"""The times of an op's parts; none where the call lasted as long as the op."""

GiveWay: TypeAlias = Callable[[], Awaitable[None]]
"""Awaited between two slices of an op: an iteration may run meanwhile, and nothing else."""


async def go_on() -> None:
    """Give way to nobody."""


@dataclass(frozen=True, slots=True)
class SequenceChunk:
    """The rows of one sequence in one iteration."""

    task_id: str
    start: int
    """Position of the first row in the sequence."""
    num_tokens: int
    blocks: Sequence[int]
    """KV-cache blocks of the sequence, in order, up to the chunk's last row at least."""
    produces: bool
    """The chunk's last row is the sequence's newest: a token follows from it (none if max_tokens is 0)."""
    index: int = 0
    """How many tokens the sequence has produced before this one."""
    num_given: int = 0
    """So many of them were drawn by another node."""
    targets: Sequence[int] = ()
    """Prompt tokens that follow the chunk's first rows, when their log-probabilities are wanted."""
    traceparent: str = ""
    """Given for pieces of prompts only."""


@dataclass(frozen=True, slots=True)
class IterationOutput:
    """The output of an iteration: activations, or at the last stage the results of its sequences.

    failed: sequences that cannot go on; they have no result. Code 500: the weights are sick, their logits are
    not finite.
    """

    hidden: TensorRef | None
    results: tuple[SequenceResult, ...] = ()
    failed: tuple[TaskFailed, ...] = ()
    took: Took = ()


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """The output of a microbatch's forward.

    hidden: activations for the next stage. reference: with preferences, those of the model as it was given.
    loss: of the last stage, which goes backward at once unless the microbatch says `backward_after_all`.
    gradient: of that backward (None when S = 1).
    """

    version: int
    hidden: TensorRef | None = None
    reference: TensorRef | None = None
    loss: float | None = None
    gradient: TensorRef | None = None
    took: Took = ()


@dataclass(frozen=True, slots=True)
class BackwardOutput:
    """The output of a microbatch's backward: the gradient of the stage's inputs, None at stage 0."""

    gradient: TensorRef | None
    took: Took = ()


@dataclass(frozen=True, slots=True)
class ScoreOutput:
    """The output of a forward that no backward follows.

    hidden: activations for the next stage. logprobs: of the last stage, of each token but the first.
    """

    hidden: TensorRef | None = None
    logprobs: tuple[float, ...] = ()
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """The files that a stage wrote for a checkpoint."""

    sha256_by_file: dict[str, str]
    file_by_tensor: dict[str, str]
    size_bytes: int
    """Size of the weights."""
    written_bytes: int
    """Size of all files."""
    adapter: AdapterKind = ""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The facts that the worker needs about the stage it runs."""

    is_tied_across_stages: bool
    weights: SavedWeights
    vocab_size: int
    context_length: int | None
    """Tokens that a prompt and its completion may have together; None: the model has no limit."""
    num_kv_blocks: int
    """Blocks of the stage's KV cache."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Those that were chosen by the model and the device, as they are told to people."""
    num_slices: NumSlices = WHOLE
    """Slices of a training pass and of a step, between which they give way."""
    num_rows_ahead: int = 0
    """Rows of each sequence that the executor may run before it is asked for them, if they have blocks."""


class Executor(Protocol[Snapshot, Copied]):
    """One stage on one device. Any method may raise LemixError or an error of the device."""

    async def load(self) -> ModelFacts:
        """Build the stage, warm it up, and say what it holds."""
        ...

    async def offer(self, peer: int, instance: str, purpose: LinkPurpose) -> LinkOffer:
        """Prepare to send tensors to the process `instance` of stage `peer`."""
        ...

    async def connect(self, peer: int, purpose: LinkPurpose, answer: LinkAnswer) -> None:
        """The peer has answered the offer."""
        ...

    def is_link_lost(self, peer: int, purpose: LinkPurpose) -> bool:
        """Whether the link to a peer has broken, though the peer may live: it wants another offer."""
        ...

    async def accept(self, offer: LinkOffer) -> LinkAnswer:
        """Prepare to take tensors from a peer."""
        ...

    def begin(self, start: SequenceStart) -> SequenceState:
        """How tokens are drawn for a sequence that begins (at the last stage)."""
        ...

    async def iteration(
        self,
        chunks: Sequence[SequenceChunk],
        rows: Rows,
        version: int | None = None,
        states: Sequence[SequenceState] = (),
    ) -> IterationOutput:
        """Run sequences with a kept weights version, or the newest (None).

        `states`: of each chunk's sequence, at the last stage. Raises VersionGoneError when the stage does
        not have the version; the tensor in `rows` is used up.
        """
        ...

    async def forward(
        self,
        microbatch: Microbatch,
        rows: Rows,
        reference: TensorRef | None = None,
        give_way: GiveWay = go_on,
    ) -> ForwardOutput:
        """`reference`: with preferences, what the stage before has made of the model as it was given."""
        ...

    async def backward(
        self, batch_id: str, index: int, gradient: TensorRef | None, give_way: GiveWay = go_on
    ) -> BackwardOutput:
        """`gradient`: of the stage's outputs, None at the last."""
        ...

    async def score(self, tokens: Sequence[int], hidden: TensorRef | None) -> ScoreOutput:
        """Run one sequence forward with the weights that train, by the operations that train.

        `hidden`: its activations, after stage 0. No log-probabilities come of an emulation.
        """
        ...

    async def discard(self, tensor: TensorRef) -> None:
        """A tensor that a peer has sent will not be used: its room is the sender's again."""
        ...

    async def finish_batch(self, batch_id: str) -> TensorRef | None:
        """All backwards of the batch are done: gather its gradients.

        Returns the tied embedding's gradient for the other end of the pipeline, where there is one.
        """
        ...

    async def measure(self, batch_id: str, tied: TensorRef | None) -> float:
        """Add the other end's gradient of a tied embedding; returns the sum of the gradients' squares."""
        ...

    async def step(self, order: StepOrder, give_way: GiveWay = go_on) -> Took:
        """Apply a measured batch's gradients, or drop them."""
        ...

    async def keep(self) -> bool:
        """Hold on to the weights as they are now, for iterations with their version.

        False: other weights were kept under that number, and are gone now.
        """
        ...

    async def release(self, version: int) -> None:
        """No more iterations will come with that version."""
        ...

    async def rendezvous(self) -> str:
        """Where the members of a merge meet, if this stage is the first of them.

        Raises CarrierError when they cannot meet here.
        """
        ...

    async def copy_state(self) -> Copied:
        """Copy all that a merge averages: weights and optimizer state.

        Other calls go on, but those that change just these would spoil the copy.
        """
        ...

    async def copy_gradients(self, batch_id: str) -> Copied:
        """Copy a measured batch's gradients; zeros when `batch_id` is empty."""
        ...

    async def average(
        self, copied: Copied, group: MergeGroup, rendezvous: str, outer: OuterStep | None = None
    ) -> None:
        """Replace a copy by the mean over the members, or by what `outer` makes of it. Other calls go on.

        Raises PeerLostError when a member is lost.
        """
        ...

    async def adopt_state(self, mean: Copied, version: int) -> None:
        """Go on from averaged weights and optimizer state."""
        ...

    async def adopt_gradients(self, mean: Copied, batch_id: str) -> float:
        """Let the step on `batch_id` use averaged gradients; returns the sum of their squares."""
        ...

    async def restore(self, checkpoint: str, version: int) -> None:
        """Drop all training in progress, load weights (empty: those loaded first). Kept versions stay."""
        ...

    async def snapshot(self) -> Snapshot:
        """Begin to copy weights and optimizer state as they are now; what changes them waits for the copy."""
        ...

    async def write(self, snapshot: Snapshot, folder: Path) -> ShardFiles:
        """Write and sync a snapshot while other calls go on. Raises OSError when the disk refuses."""
        ...

    async def close(self) -> None: ...
