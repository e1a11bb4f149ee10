"""The handle of a tensor that travels outside the message."""

from typing import Literal

from shared.messages.base import Message
from shared.messages.bounds import Count

DtypeName = Literal["float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"]
INLINE_LIMIT_BYTES = 32 * 1024


class TensorRef(Message):
    """Where a tensor lies and what it is; small enough for any message."""

    carrier: str
    """Which carrier wrote it: `local`, `shm`, `cuda_ipc`, `collective`, `inline`."""
    shape: tuple[int, ...]
    dtype: DtypeName
    """The torch name without its prefix: `float32`, `bfloat16`, `int64`."""
    size_bytes: Count
    place: str = ""
    """The ring that holds it (`shm`, `cuda_ipc`), or the link."""
    slot: Count = 0
    generation: Count = 0
    """How often the slot was written; a reader of an older one must not take the newer. Else a number."""
    data: bytes = b""
    """The bytes themselves (`inline` only)."""
