"""Messages about a node's weights: restore them, save them."""

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
