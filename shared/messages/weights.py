"""Messages about a node's weights: restore them, save them, serve a version of them."""

from typing import Literal

from shared.messages.base import Message

ServingRule = Literal["newest", "published", "pinned"]
"""Which weights serve. `newest`: each stage's own, from one iteration to the next. `published`: the version
that the trainer published last, on all stages. `pinned`: the same, but a request ends with the version that
it began with.
"""


class RestoreWeights(Message):
    """Drop all training in progress and hold exactly these weights. trainer -> each stage."""

    epoch: int
    version: int
    checkpoint: str
    """Folder of a checkpoint; empty: the model as it was loaded first."""
    serving: ServingRule = "newest"


class SaveWeights(Message):
    """Write a checkpoint shard as soon as the stage holds `version`. trainer -> each stage.

    Refused when the stage is already past it. The shard is announced by `ShardSaved`.
    """

    epoch: int
    version: int
    folder: str


class PublishVersion(Message):
    """Serve this version, which every stage keeps. trainer -> stage 0."""

    epoch: int
    version: int


class ReleaseVersion(Message):
    """Serving needs this version no more: keep it no longer. trainer -> each stage."""

    epoch: int
    version: int


class WeightsRequest(Message):
    """Ask for the weights of all nodes."""


class NodeWeights(Message):
    """The weights of one node as the trainer sees them."""

    node: int
    version: int
    """The newest."""
    durable_version: int
    published: int | None
    """What serves; None: the newest."""
    held_out_loss: float | None
    """Of what serves: mean per learnt token, in nats; None: no guard, or not known yet."""
    num_withheld: int
    """Versions that the guard has not let serve."""
    last_withheld: int | None


class WeightsStatus(Message):
    """The trainer's answer."""

    nodes: tuple[NodeWeights, ...]
