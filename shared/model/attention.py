"""Where LeMix takes attention out of Hugging Face's hands.

The models call the attention function named "lemix" for every layer; it hands queries, keys and values to
the `AttentionContext` which came with the forward. With the name comes no mask function, so the models build
no mask: what a token may see is the context's business.

Shape letters: T tokens of the flat row, N query heads, K key and value heads, D head size.
"""

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from shared.errors import UnsupportedModelError
from shared.model.varlen import varlen_for

ATTENTION_NAME: Final = "lemix"
LAYER_ATTRIBUTE: Final = "lemix_layer"
"""Set by the loader on each attention module: its layer's number within the stage, from 0."""

_HARMLESS_EXTRAS = frozenset({"position_ids", "use_cache", "cache_position", "position_embeddings"})
"""Arguments that models pass to attention functions and that change nothing in attention."""


class AttentionContext(Protocol):
    """Says what each token of one forward sees, and keeps keys and values where they must be kept."""

    def attend(
        self,
        layer: int,
        query_1NTD: Tensor,
        key_1KTD: Tensor,
        value_1KTD: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
    ) -> Tensor:
        """Return the attention output [1, T, N, D]; `layer` counts from 0 within the stage.

        With a `sliding_window` of w a token sees itself and the w - 1 tokens before it.
        """
        ...


def lemix_attention(
    module: nn.Module,
    query_1NTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    attention_mask: Tensor | None = None,
    *,
    attention_context: AttentionContext,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **extras: Any,
) -> tuple[Tensor, None]:
    """The attention function which transformers calls.

    Raises:
        UnsupportedModelError: the model wants something of attention that LeMix does not do.
    """
    if attention_mask is not None or dropout > 0.0 or is_causal is False or extras.keys() - _HARMLESS_EXTRAS:
        _refuse_unsupported(
            attention_mask=attention_mask, dropout=dropout or None, is_causal=is_causal, **extras
        )
    output_1TND = attention_context.attend(
        getattr(module, LAYER_ATTRIBUTE),
        query_1NTD,
        key_1KTD,
        value_1KTD,
        scaling=query_1NTD.size(-1) ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
    )
    return output_1TND, None


def _refuse_unsupported(**arguments: Any) -> None:
    def is_off(name: str) -> bool:
        value = arguments[name]
        return value is not False if name == "is_causal" else value is None or value is False

    wanted = sorted(arguments.keys() - _HARMLESS_EXTRAS - {name for name in arguments if is_off(name)})
    if wanted:
        raise UnsupportedModelError(f"attention with {', '.join(wanted)} is not supported")


AttentionInterface.register(ATTENTION_NAME, lemix_attention)


class CausalMasks:
    """The masks of one forward, each made once for all its layers."""

    def __init__(self) -> None:
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    def __call__(self, length: int, context: int, sliding_window: int | None, like: Tensor) -> Tensor:
        """See `causal_mask`; `like` is the same for all."""
        key = (length, context, sliding_window)
        if key not in self._masks:
            self._masks[key] = causal_mask(length, context, sliding_window, like)
        return self._masks[key]


def causal_attention(
    query_BNLD: Tensor,
    key_BKCD: Tensor,
    value_BKCD: Tensor,
    scaling: float,
    sliding_window: int | None,
    masks: CausalMasks,
) -> Tensor:
    """Attention [B, N, L, D] of the last L of C tokens to all tokens up to themselves."""
    length, context = query_BNLD.size(2), key_BKCD.size(2)
    plain = length == context and (sliding_window is None or context <= sliding_window)
    return scaled_dot_product_attention(
        query_BNLD,
        key_BKCD,
        value_BKCD,
        attn_mask=None if plain else masks(length, context, sliding_window, query_BNLD),
        is_causal=plain,
        scale=scaling,
        enable_gqa=query_BNLD.size(1) != key_BKCD.size(1),
    )


def causal_mask(length: int, context: int, sliding_window: int | None, like: Tensor) -> Tensor:
    """Additive mask [length, context] for the last `length` of `context` tokens, in the dtype of `like`."""
    hidden = torch.full((length, context), float("-inf"), dtype=like.dtype, device=like.device)
    mask = hidden.triu_(context - length + 1)
    if sliding_window is not None and sliding_window < context:
        mask += torch.full_like(mask, float("-inf")).tril_(context - length - sliding_window)
    return mask


@dataclass(frozen=True)
class PackedSegments:
    """Attention for training: the row is made of segments, each causal within itself and blind to the others.

    `lengths` add up to T. Differentiable; keeps nothing.
    """

    lengths: tuple[int, ...]
    masks: CausalMasks = field(default_factory=CausalMasks, compare=False)
    ends: dict[torch.device, Tensor] = field(default_factory=dict, compare=False)
    """From 0 on, int32, made once for all layers."""

    def attend(
        self,
        layer: int,
        query_1NTD: Tensor,
        key_1KTD: Tensor,
        value_1KTD: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
    ) -> Tensor:
        """See `AttentionContext.attend`."""
        if len(set(self.lengths)) == 1:
            query_BNLD, key_BKLD, value_BKLD = map(self._as_batch, (query_1NTD, key_1KTD, value_1KTD))
            output_BNLD = causal_attention(
                query_BNLD, key_BKLD, value_BKLD, scaling, sliding_window, self.masks
            )
            return output_BNLD.transpose(1, 2).flatten(0, 1).unsqueeze(0)
        if (varlen := varlen_for(query_1NTD)) is not None:
            query, key, value = (rows[0].transpose(0, 1) for rows in (query_1NTD, key_1KTD, value_1KTD))
            output_TND = varlen(
                query,
                key,
                value,
                self._ends_on(query.device),
                max(self.lengths),
                scaling=scaling,
                sliding_window=sliding_window,
            )
            return output_TND.unsqueeze(0)
        segments = zip(*map(self._as_segments, (query_1NTD, key_1KTD, value_1KTD)), strict=True)
        outputs = [
            causal_attention(query, key, value, scaling, sliding_window, self.masks)
            for query, key, value in segments
        ]
        return torch.cat(outputs, 2).transpose(1, 2)

    def _ends_on(self, device: torch.device) -> Tensor:
        if device not in self.ends:
            ends = [0, *accumulate(self.lengths)]
            self.ends[device] = torch.tensor(ends, dtype=torch.int32, device=device)
        return self.ends[device]

    def _as_batch(self, rows_1HTD: Tensor) -> Tensor:
        _, num_heads, _, head_dim = rows_1HTD.shape
        return rows_1HTD.reshape(num_heads, len(self.lengths), -1, head_dim).transpose(0, 1)

    def _as_segments(self, rows_1HTD: Tensor) -> tuple[Tensor, ...]:
        return rows_1HTD.tensor_split(tuple(accumulate(self.lengths[:-1])), 2)
