"""Messages by which processes find and describe each other."""

from typing import Annotated, Literal

from msgspec import Meta

from shared.messages.base import Message
from shared.messages.bounds import Count, FileStem, PositiveInt
from shared.settings import MAX_ITERATION_TOKENS
from shared.slices import WHOLE, NumSlices


class Heartbeat(Message):
    """A stage worker is alive and this is how it stands; sent every HEARTBEAT_S."""

    node: int
    stage: int
    num_stages: int
    instance: FileStem
    """Changes with every start of the process. Part of file names."""
    model: str
    device: str
    profile: str = ""
    """The profile that forecasts of this node start from; empty: the scheduler's own."""
    first_on_device: Count | None = None
    """The first of the process's stages on this device, which does one op at a time; None: its own."""
    num_slices: NumSlices = WHOLE
    """Slices of a training pass and of a step, between which they give way to iterations."""
    ready: bool
    """The model is loaded and the links to both neighbours stand."""
    whole: bool = False
    """Stage 0 only: all stages are ready and hold weights of one lineage, so that requests may come."""
    weights_version: int
    sick_version: int | None = None
    """The last weights version whose logits were not finite; None: there was none (last stage)."""
    checkpoint: str
    """The checkpoint that the weights descend from; empty: the model as published."""
    checkpoint_digest: str = ""
    """As in `SavedWeights`."""
    fence: int
    """The fence of the trainer's last restore on this stage; 0 before any."""
    running: int
    """Sequences in the KV cache (stage 0)."""
    waiting: int
    """Sequences not yet admitted (stage 0)."""
    queued: int
    """Work items in the stage's local queue."""
    preempted: int = 0
    """How often a sequence lost its KV cache to an older one, since the start (stage 0)."""
    kv_blocks_used: int
    kv_blocks_total: int
    kv_block_size: PositiveInt = 1
    """Tokens of a block."""
    max_iteration_tokens: PositiveInt = MAX_ITERATION_TOKENS
    """Rows that an iteration has at most (stage 0)."""
    serving_version: int | None = None
    """The weights version with which requests run (stage 0)."""


class StageStopped(Message):
    """A stage worker is leaving on purpose."""

    node: int
    stage: int
    instance: str


LinkPurpose = Literal["activations", "tied"]
"""The tensors on a link: rows of activations and their gradients, or the gradient of a tied embedding."""


class GpuRing(Message):
    """A ring of slots in a GPU's memory, by the handles that open it in another process (`cuda_ipc`)."""

    gpu: str
    """The hardware's own name."""
    memory: bytes
    written: tuple[bytes, ...]
    """Handles of events: by slot, that it is written."""
    read: tuple[bytes, ...]
    """Handles of events: by slot, that it is read."""


class LinkOffer(Message):
    """A producer offers a place for its tensors to their consumer."""

    stage: int
    instance: str
    purpose: LinkPurpose = "activations"
    carrier: str
    place: str
    """Path of a file (`shm`, `cuda_ipc`); a name (`local`); an address and a name (`collective`)."""
    slot_bytes: Annotated[int, Meta(gt=0, le=1 << 36)] = 1
    """The size of one slot (`shm`, `cuda_ipc`)."""
    num_slots: Annotated[int, Meta(gt=0, le=256)] = 1
    ring: GpuRing | None = None
    """`cuda_ipc` only."""


class LinkAnswer(Message):
    """Whether the consumer could open what was offered; if not, only small tensors can be sent (inline)."""

    accepted: bool
    reason: str = ""


class RendezvousRequest(Message):
    """Ask the first member of a merge where its members meet."""


class Rendezvous(Message):
    """Where the members of a merge meet."""

    address: str
    """`host:port` of a key-value store."""
    settings: dict[str, str]
    """The first member's training settings: the others must train the same, or there is no mean."""


class StatusRequest(Message):
    """Ask for the cluster's state."""


class NodeStatus(Message):
    """One node as the scheduler sees it."""

    node: int
    ready: bool
    inference_tasks: int
    training_tasks: int
    stages: tuple[Heartbeat, ...]


class ForecastError(Message):
    """How far predictions were from what happened."""

    mean: float = 0.0
    """Mean absolute error relative to what happened (MAPE / 100)."""
    count: int = 0


class ClusterStatus(Message):
    """The scheduler's answer to `lemix status` and to the gateway's metrics."""

    policy: str
    nodes: tuple[NodeStatus, ...]
    forward_error: ForecastError = ForecastError()
    """Error of the cost model, for each iteration and training forward on a stage."""
    response_error: ForecastError = ForecastError()
    """Error of the forecast at placement, for each request from its arrival to its first token."""
    slo_s: float = 0.0
    """The run's objective for a prompt of mean length: from its arrival to its first token."""
    tbt_s: float | None = None
    """The run's objective between two tokens; None: there is none."""
    num_in_time: Count = 0
    """Requests whose first token came in time, by their own objective or the run's, since the start."""
    num_late: Count = 0
    """Requests whose first token came later."""
    num_refused: Count = 0
    """Requests that were refused (429), since the start."""
    num_in_line: Count = 0
    """Requests that wait for a node because they cannot be in time."""


TaskKind = Literal["inference", "training"]
