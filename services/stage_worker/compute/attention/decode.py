"""The interface to attention of rows of one token each: the part of an iteration that is worth a choice.

Shape letters: B decode rows, N query heads, X heads of keys and as many of values together, D head size.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from services.stage_worker.compute.attention.chunks import Chunk


class DecodeAttention(Protocol):
    """The decode rows of one iteration."""

    def attend(
        self,
        layer: int,
        query_BND: Tensor,
        key_value_BXD: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
    ) -> Tensor:
        """Return the attention output [B, N, D]; keys and values are in the cache already."""
        ...


class Decoder(Protocol):
    """One way to attend to the cache. All iterations must come by, in their order."""

    def begin(self, chunks: Sequence[Chunk]) -> DecodeAttention:
        """Prepare for an iteration of these chunks; those of one token are its decode rows."""
        ...


def decode_chunks(chunks: Sequence[Chunk]) -> list[Chunk]:
    """The chunks that are decode rows."""
    return [chunk for chunk in chunks if chunk.num_tokens == 1]
