"""Messages about a node's weights: restore them, save them, merge them with those of other nodes."""

from pydantic import Field

from shared.messages.base import Message


class RestoreWeights(Message):
    """Drop all training in progress and hold exactly these weights. trainer -> each stage."""

    epoch: int
    version: int
    checkpoint: str
    """Folder of a checkpoint; empty: the model as it was loaded first."""


class SaveWeights(Message):
    """Write a checkpoint shard as soon as the stage holds `version`. trainer -> each stage.

    Refused when the stage is already past it. The shard is announced by `ShardSaved`.
    """

    epoch: int
    version: int
    folder: str


class MergeMember(Message):
    """One node of a merge."""

    node: int
    share: float = Field(ge=0, le=1)
    """Of the mean; those of all members sum to 1."""


class MergeGroup(Message):
    """The same stage of several nodes, which compute a mean together."""

    name: str = Field(pattern=r"^[\w.-]+$")
    """Of this merge alone."""
    members: tuple[MergeMember, ...] = Field(min_length=1)
    """In the order in which they are summed."""


class OuterStep(Message):
    """The outer optimizer of DiLoCo (arXiv 2311.08105): Nesterov's momentum on what the mean has moved."""

    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    momentum: float = Field(ge=0, lt=1)


class MergeWeights(Message):
    """Hold the mean of the members' weights and optimizer states. trainer -> each stage of each member.

    No training is in flight there. Answered when the stage holds it; serving goes on meanwhile.
    """

    epoch: int
    version: int
    """Of the merged weights: the batches that they contain."""
    group: MergeGroup
    outer: OuterStep | None = None


class ReduceGradients(Message):
    """Average gradients over the members, for one step of all. trainer -> each stage of each member.

    Then `GradientsReady` and `StepOrder` speak of the group's name instead of the batch.
    """

    epoch: int
    batch_id: str
    """This node's; empty where it has none and adds nothing (its share is 0)."""
    group: MergeGroup
