"""Messages about weights: stages restore, save, serve, merge them, people ask which there are and go back."""

from typing import Annotated, Literal

from msgspec import Meta

from shared.messages.base import Message
from shared.messages.bounds import FileStem, PositiveFloat, Share
from shared.schedule import BY_DEFAULT, Feeding

ServingRule = Literal["newest", "published", "pinned"]
"""Which weights serve. `newest`: each stage's own, from one iteration to the next. `published`: the version
that the trainer published last, on all stages. `pinned`: the same, but a request ends with the version that
it began with.
"""


class SavedWeights(Message):
    """Weights that a stage can load."""

    version: int
    checkpoint: str
    """Folder of a checkpoint; empty: the model as it was loaded first."""
    digest: str = ""
    """The digest of the checkpoint: after a rollback, version and folder come again with other weights."""


class RestoreWeights(Message):
    """Drop all training in progress and hold exactly these weights. trainer -> each stage."""

    fence: int
    weights: SavedWeights
    serving: ServingRule = "newest"
    served: SavedWeights | None = None
    """The weights to serve instead, because a guard has not approved these; stages keep them under their
    number. None: these weights serve.
    """
    feeding: Feeding = BY_DEFAULT
    """How microbatches enter the node from now on."""

    @property
    def served_version(self) -> int:
        return (self.served or self.weights).version


class AllowedFences(Message):
    """The fences that the trainer's lease allows: those that it has begun. A trainer's lease."""

    first: int
    """Those of earlier trainers are below it."""
    last: int


class SaveWeights(Message):
    """Write a checkpoint shard as soon as the stage holds `version`. trainer -> each stage.

    Refused when the stage is already past it. The shard is announced by `ShardSaved`.
    """

    fence: int
    version: int
    folder: str


class MergeMember(Message):
    """One node of a merge."""

    node: int
    fence: int
    """The fence of its weights. When no member's fence has changed, they know each other already."""
    share: Share
    """Its share of the mean; the shares of all members sum to 1."""


class MergeGroup(Message):
    """The same stage of several nodes, which compute a mean together."""

    name: FileStem
    """A name for this merge alone."""
    members: Annotated[tuple[MergeMember, ...], Meta(min_length=1)]
    """The members, in the order in which they are summed."""


class OuterStep(Message):
    """The outer optimizer of DiLoCo (arXiv 2311.08105): Nesterov's momentum on what the mean has moved."""

    learning_rate: PositiveFloat
    momentum: Annotated[float, Meta(ge=0, lt=1)]


class MergeWeights(Message):
    """Hold the mean of the members' weights and optimizer states. trainer -> each stage of each member.

    No training is in flight there. Answered when the stage holds it; serving goes on meanwhile.
    """

    fence: int
    version: int
    """The version of the merged weights: the number of batches that they contain."""
    keep: bool = False
    """Hold on to the version until it is released, to serve it."""
    group: MergeGroup
    outer: OuterStep | None = None


class ReduceGradients(Message):
    """Average gradients over the members, for one step of all. trainer -> each stage of each member.

    Then `GradientsReady`, `BatchReady` and `StepOrder` speak of the group's name instead of the batch.
    """

    fence: int
    batch_id: str
    """This node's; empty where it has none and adds nothing (its share is 0)."""
    group: MergeGroup


class DurableVersionsRequest(Message):
    """Ask for the durable versions of all nodes."""


class DurableVersion(Message):
    """A durable checkpoint, as people see it."""

    node: int
    version: int
    """Optimizer steps, and thus batches, that its weights contain."""
    created_wall_s: float
    """Unix time."""
    newest_batch_id: str
    """The last of its batches; empty when it has none that it knows the id of."""
    held_out_loss: float | None
    """Mean loss per label on held-out examples, in nats; None: not measured."""
    samples_loss: float | None = None
    """On what the model wrote itself before it learnt."""
    may_serve: bool
    """False: a guard has not let it serve."""
    num_ahead: int | None
    """The node serves this version and so many batches more; None: it serves another one, or nothing."""


class DurableVersions(Message):
    """Every durable version. By node, newest first."""

    versions: tuple[DurableVersion, ...]


class RollBackWeights(Message):
    """Go back to an older durable version, for good. anyone -> trainer.

    Refused with 404 when there is no such version, with 409 when a node is going back already, or is to go
    back alone and shares its weights with others.
    """

    version: int
    node: int | None = None
    """None: all nodes that run."""


class RolledBack(Message):
    """The nodes are at the version that was asked for, or will be once their stages have loaded it."""

    nodes: tuple[int, ...]
    num_discarded: int
    """Batches that were in the weights of these nodes; they are done with, and in no weights any more."""


class KeepVersion(Message):
    """Hold on to the present weights, to serve them, until `ReleaseVersion`. trainer -> each stage.

    Answered when they are kept. Refused with 409 when they are of another version than this.
    """

    fence: int
    version: int


class PublishVersion(Message):
    """Serve this version, which every stage keeps. trainer -> stage 0."""

    fence: int
    version: int


class ReleaseVersion(Message):
    """Serving needs this version no more: keep it no longer. trainer -> each stage."""

    fence: int
    version: int


class WeightsRequest(Message):
    """Ask for the weights of all nodes."""


class JudgedVersion(Message):
    """A version that a guard has judged. Losses are in nats per learnt token; None: not measured."""

    version: int
    judged_wall_s: float
    """Unix time."""
    training_loss: float | None = None
    """Mean of the batch whose step made the version, before that step."""
    held_out_loss: float | None = None
    """On held-out examples."""
    samples_loss: float | None = None
    """On what the model wrote itself before it learnt."""
    why_withheld: str = ""
    """Which loss is above which limit; empty: it may serve."""


class NodeWeights(Message):
    """The weights of one node as the trainer sees them."""

    node: int
    version: int
    """The newest."""
    durable_version: int
    published: int | None
    """The version that serves; None: the newest, or with a guard none before the node is restored."""
    is_guarded: bool = False
    """Versions are judged before they serve."""
    held_out_loss: float | None
    """The loss of the served version, mean per learnt token, in nats; None: no guard, or not known yet."""
    samples_loss: float | None
    """On what the model wrote itself before it learnt."""
    num_withheld: int
    """Versions that the guard has not let serve."""
    last_withheld: int | None
    why_withheld: str = ""
    newest_judged: int = 0
    """The newest version that a guard has judged, in this or an earlier life of the trainer."""
    training_loss: float | None = None
    """Mean of the newest batch per label, before its step, in nats; None: there was none yet."""
    judged: tuple[JudgedVersion, ...] = ()
    """The newest verdicts, oldest first."""
    why_differing: str | None = None
    """How what serves differs from what trains, by the last check; empty: it does not; None: not checked."""
    halt_reason: str = ""
    """Why the node trains no more; empty: it does."""

    def awaits_verdict(self, version: int) -> bool:
        """Whether a guard has yet to judge that version, or a later one."""
        return self.is_guarded and (self.published is None or self.newest_judged < version)

    @property
    def why_newest_withheld(self) -> str:
        """Why the newest version that was judged does not serve, where it does not."""
        newest = (each for each in reversed(self.judged) if each.version == self.newest_judged)
        return next((each.why_withheld for each in newest), self.why_withheld)

    def withholds(self, version: int) -> bool:
        """Whether a guard has judged that version, or a later one, and still an older one serves."""
        is_older = self.published is not None and self.published < version
        return self.is_guarded and is_older and not self.awaits_verdict(version)


class WeightsStatus(Message):
    """The trainer's answer."""

    nodes: tuple[NodeWeights, ...]
    shares_weights: bool = False
    """The nodes are one model: what one of them serves, all will."""
