"""Messages of a training batch's life: placed, cut into microbatches, run, reported."""

from base64 import b64decode, b64encode
from typing import Annotated, Literal, Self

from msgspec import Meta, field

from shared.documents import Document
from shared.messages.base import Event, Message
from shared.messages.bounds import Count, NonNegativeFloat, PositiveFloat, PositiveInt
from shared.tensors.ref import TensorRef

MAX_BATCHES_OF_MESSAGE = 64
"""Ids of batches in one message: keeps it below 1 MiB, however long they are."""
BatchIds = Annotated[tuple[str, ...], Meta(max_length=MAX_BATCHES_OF_MESSAGE)]
Positions = tuple[Count, ...]
"""Examples of a batch, counted from 0."""


class TrainingTask(Message):
    """A training batch that wants a node. trainer -> scheduler."""

    task_id: str
    microbatch_tokens: tuple[int, ...]
    """Rows of each microbatch."""
    microbatch_lengths: tuple[tuple[PositiveInt, ...], ...] = ()
    """Tokens of each example of each microbatch; empty: each microbatch is one example."""


class Microbatch(Message):
    """The facts that every stage needs about a microbatch."""

    fence: Count
    """The trainer's fencing number; stages ignore lower ones than the last they saw."""
    batch_id: str
    index: Count
    count: int
    """Microbatches in the batch; a stage's gradients are complete after the last one's backward."""
    lengths: Annotated[tuple[PositiveInt, ...], Meta(min_length=1)]
    """Tokens of each sequence; their sum is the number of rows T."""
    label_rows: tuple[int, ...]
    """Rows in 0..T-1 whose next token counts in the loss."""
    labels: tuple[int, ...]
    """The next token of each of `label_rows`."""
    loss_weight: NonNegativeFloat
    """1 / (labels in the whole batch): the loss is the batch's mean over labels. Or 1 / (its preferences)."""
    beta: PositiveFloat | None = None
    """Given where the sequences are preferences: pairs of answers to one input, the preferred one first."""
    backward_after_all: bool = False
    """The last stage runs no backward of the batch before all its forwards (GPipe)."""
    offload: bool = False
    """Keep what the forward saves for its backward in host memory, for want of room on the device."""
    traceparent: str = ""

    def __post_init__(self) -> None:
        if self.index >= self.count:
            raise ValueError(f"microbatch {self.index} of {self.count}")
        if len(self.labels) != len(self.label_rows):
            raise ValueError(f"{len(self.labels)} labels for {len(self.label_rows)} rows")
        if self.beta is not None and len(self.lengths) % 2:
            raise ValueError(f"{len(self.lengths)} sequences are no pairs")


class MicrobatchForward(Message):
    """A microbatch enters a stage: as tokens at stage 0, as activations after it."""

    microbatch: Microbatch
    tokens: tuple[int, ...] = ()
    hidden: TensorRef | None = None
    """[T, hidden_size]."""
    reference: TensorRef | None = None
    """[T, hidden_size]: with preferences, the activations of the model as it was given."""

    def __post_init__(self) -> None:
        is_wanted = self.hidden is not None and self.microbatch.beta is not None
        if is_wanted != (self.reference is not None):
            raise ValueError("activations of the reference come with those of preferences, and only there")

    @property
    def tensors(self) -> tuple[TensorRef, ...]:
        return tuple(each for each in (self.hidden, self.reference) if each is not None)


class CheckForward(Message):
    """A few tokens go forward with the weights that train, and no backward follows. trainer -> each stage."""

    fence: int
    version: int
    """The version of the weights that is meant; a stage whose weights are of another one ends the check."""
    tokens: tuple[int, ...]
    hidden: TensorRef | None = None
    """[len(tokens), hidden_size], after stage 0."""


class MicrobatchBackward(Message):
    """The gradient of a microbatch's activations. stage s -> stage s-1."""

    fence: int
    batch_id: str
    index: int
    gradient: TensorRef
    """[T, hidden_size]."""


class TiedGradient(Message):
    """The gradient of a tied embedding, exchanged by first and last stage before a step."""

    fence: int
    batch_id: str
    gradient: TensorRef
    """[vocab_size, hidden_size]."""


class StepAhead(Message):
    """How to step on a batch, given before its gradients are there. trainer -> stage 0.

    It holds when all of them are finite and the weights are of the version before; else stage 0 asks with
    `BatchReady`, and the trainer sends a `StepOrder`, or this anew.
    """

    fence: int
    batch_id: str
    version: int
    """The version of the weights after the step."""
    learning_rate: NonNegativeFloat
    max_gradient_norm: PositiveFloat | None = None
    """Gradients whose norm over all stages is larger are scaled down to it; None: there is no limit."""
    keep: bool = False
    """Hold on to `version` for serving, until `ReleaseVersion`."""


class StepOrder(Message):
    """Step on a batch whose gradients every stage has, or skip it. trainer -> stage 0 -> each stage."""

    fence: int
    batch_id: str
    version: int
    """The version of the weights after the step."""
    learning_rate: NonNegativeFloat
    gradient_scale: PositiveFloat = 1.0
    """Factor for the gradients: clips their norm over all stages."""
    skip: bool = False
    """Drop the gradients and change nothing: some stage's are not finite. `version` is the present one."""
    keep: bool = False
    """Hold on to `version` for serving, until `ReleaseVersion`."""


class GradientsReady(Event, tag="gradients"):
    """A stage has the whole batch's gradients, and waits for the order to step. To stage 0."""

    batch_id: str
    squared_norm: float
    """Sum of the squares of this stage's gradients, a tied embedding's on the first stage only; not finite
    when one of them is not."""
    loss: float = 0.0
    """Mean loss of the batch per label, or per preference, in nats; of the last stage alone."""


class StepDone(Event, tag="step"):
    """A stage has stepped as ordered, or skipped; its weights are now of `version`. To stage 0."""

    batch_id: str
    version: int


class TrainedReport(Message):
    """A stage tells the first one of its node, which leads the training there."""

    stage: int
    fence: int
    event: GradientsReady | StepDone


class MicrobatchEntered(Event, tag="entered"):
    """Stage 0 has run a microbatch forward. Told of a batch's last one, and else once in a while."""

    batch_id: str
    index: int


class BatchReady(Event, tag="ready"):
    """Every stage has a batch's gradients, and they wait for an order: none was given ahead that holds."""

    batch_id: str
    squared_norm: float
    """Over all stages."""


class BatchStepped(Event, tag="stepped"):
    """Every stage has stepped on a batch, or skipped it; the weights are now of `version`."""

    batch_id: str
    version: int
    loss: float
    """Mean of the batch per label, or per preference, before the step, in nats."""


class TrainingFailed(Event, tag="failed"):
    """A forward, backward or step raised; the node must be restored."""

    batch_id: str
    reason: str
    is_batch_at_fault: bool = True
    """False: memory or a carrier gave out, which says nothing about the batch."""
    lacks_memory: bool = False
    """It was memory that gave out."""


AdapterKind = Literal["", "lora"]
"""The kind of trained weights: the whole model's (""), or an adapter beside the published ones."""


class ShardSaved(Event, tag="saved"):
    """A stage has written and synced its share of a checkpoint."""

    version: int
    sha256_by_file: dict[str, str]
    file_by_tensor: dict[str, str]
    """Weights only, in Hugging Face names, or an adapter's in those of peft."""
    size_bytes: int
    """Size of the weights."""
    written_bytes: int = 0
    """Size of all files."""
    adapter: AdapterKind = ""
    """The kind of these weights."""
    settings: dict[str, str] = field(default_factory=dict)
    """Those of the stage that the weights depend on."""


class SaveFailed(Event, tag="save_failed"):
    """A stage could not write its share of a checkpoint that it had agreed to write (the disk refused)."""

    version: int
    reason: str


class VersionsServed(Event, tag="served"):
    """Stage 0 serves other versions than before; also told again once in a while."""

    published: int
    """The one that new requests get."""
    in_use: tuple[int, ...]
    """Those that requests run with, oldest first."""


class CheckScored(Event, tag="scored"):
    """A check is over: see `CheckForward`."""

    version: int
    logprobs: tuple[float, ...] = ()
    """Those of all tokens but the first. Empty: a stage had other weights, failed, or computes nothing."""
    dtype: str = ""
    """The stages compute in it."""


StageEvent = (
    MicrobatchEntered
    | BatchReady
    | BatchStepped
    | TrainingFailed
    | ShardSaved
    | SaveFailed
    | VersionsServed
    | CheckScored
)


class StageReport(Message):
    """An event of training on a stage. stage -> trainer."""

    node: int
    stage: int
    fence: int
    event: StageEvent


BodyForm = Literal["text", "base64", "left_out"]
"""`base64`: what is no text (MessagePack); `left_out`: what would be too large for the message."""


class RejectedBatch(Document):
    """A training batch that cannot be used, and why. trainer -> lemix.train.rejected (as JSON)."""

    batch_id: str
    sequence: int
    """Where the batch stands in the training stream."""
    reason: str
    body: str = ""
    """The batch as it was published, in `body_form`."""
    body_form: BodyForm = "left_out"

    @classmethod
    def of(cls, body: bytes, *, batch_id: str, sequence: int, reason: str) -> Self:
        """The batch that was published with that body."""
        form: BodyForm
        try:
            text, form = body.decode(), "text"
        except UnicodeDecodeError:
            text, form = b64encode(body).decode(), "base64"
        return cls(batch_id=batch_id, sequence=sequence, reason=reason, body=text, body_form=form)

    @property
    def published(self) -> bytes | None:
        """The batch as it was published, byte for byte; None when it is left out."""
        match self.body_form:
            case "text":
                return self.body.encode()
            case "base64":
                return b64decode(self.body)
            case "left_out":
                return None

    def without_body(self) -> Self:
        """The same rejection without the published batch."""
        return self.model_copy(update={"body": "", "body_form": "left_out"})


class BatchPlaced(Event, tag="placed"):
    """A node has taken the batch; it computes on it from now until the batch is applied or placed anew."""

    batch_id: str
    node: int


class BatchDeferred(Event, tag="deferred"):
    """The scheduler made the batch wait, because requests would else be late: a preemption."""

    batch_id: str


class BatchApplied(Event, tag="applied"):
    """A node's weights contain the batch. A node that loses its weights takes that back: it comes again."""

    batch_id: str
    node: int
    version: int
    """The version of the node's weights, with the batch in them."""
    loss: float
    """Mean over the batch's labels, or its preferences, before its step, in nats."""
    num_tokens: int
    held_out: Positions = ()
    """Its examples that are held out and train nothing, where it names their sources."""


class BatchDurable(Event, tag="durable"):
    """A durable checkpoint contains the batches: this is final, unless somebody rolls it back."""

    batch_ids: BatchIds
    node: int
    version: int
    checkpoint: str
    """Its folder."""
    held_out: dict[str, Positions] = field(default_factory=dict)
    """As in `BatchApplied`, by batch; of those that have such examples, and are among the newest."""


class BatchRejected(Event, tag="rejected"):
    """The batch will not be applied: this is final."""

    batch_id: str
    reason: str


class BatchHeldOut(Event, tag="held_out"):
    """All examples of the batch are held out: it trains nothing, and is done with. This is final."""

    batch_id: str


BatchEvent = BatchPlaced | BatchDeferred | BatchApplied | BatchDurable | BatchRejected | BatchHeldOut


class BatchProgress(Message):
    """An event of a training batch. trainer -> whoever listens; may be lost, so ask after a silence."""

    event: BatchEvent


class BatchesAsked(Message):
    """Ask the trainer how these batches stand."""

    batch_ids: BatchIds


class BatchesNow(Message):
    """The newest event of each batch that was asked for; a batch without one is pending, or unknown."""

    events: tuple[BatchEvent, ...]
    unknown: tuple[str, ...]
    """Neither pending nor known from a durable checkpoint or a late rejection."""
    read_up_to: int
    """The trainer has read the stream up to this sequence: an unknown batch beyond it is still to come."""


class BatchCheck(Message):
    """Ask whether a batch that is to be published can be learnt from. lemix -> trainer."""

    body: bytes
    """As it is to be published."""


class BatchChecked(Message):
    """The trainer's answer."""

    reason: str = ""
    """Why it cannot; empty: it can."""
    example: Count | None = None
    """The first example that is wrong, counted from 0; None: nothing is, or the batch itself."""
