"""Decode rows over keys and values that lie side by side, kept from one iteration to the next.

The rows of a running batch stay the same for many iterations. So a window holds a copy of their contexts, to
which each iteration appends one token a row; only a row that enters is gathered from its blocks. The cache
stays complete: a window may be forgotten at any time.

Shape letters: B decode rows, N query heads, K heads of keys, X = 2K of keys and values, D head size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from services.stage_worker.compute.attention.chunks import Chunk
from services.stage_worker.compute.attention.decode import DecodeAttention, decode_chunks
from services.stage_worker.compute.attention.gathered import GatheredDecodes
from services.stage_worker.compute.attention.rows import attend_rows, decode_mask
from services.stage_worker.compute.kv_cache import PagedKVCache

_GRAIN_TOKENS: Final = 64
"""A window is read up to a multiple of this, so that its views are the same for as many iterations."""


class _Held(NamedTuple):
    """The context in a row of a window: `num_tokens` tokens, which are also in `blocks`."""

    num_tokens: int
    blocks: tuple[int, ...]


class WindowedDecoder:
    """Implements `Decoder`: one window for each of the iterations that take turns."""

    def __init__(self, cache: PagedKVCache, num_windows: int = 1) -> None:
        """`num_windows`: iterations of different sequences that are in the pipeline at once.

        All windows together take at most as much memory as the cache.
        """
        self._cache = cache
        self._windows = [DecodeWindow(cache, cache.num_slots // num_windows) for _ in range(num_windows)]
        """The latest used last."""

    def begin(self, chunks: Sequence[Chunk]) -> DecodeAttention:
        """See `Decoder.begin`."""
        decodes = decode_chunks(chunks)
        block_size = self._cache.block_size
        continued = [_Held(each.start, each.blocks_of(each.start, block_size)) for each in decodes]
        window = self._window_of(continued) if decodes else None
        written = {block for chunk in chunks for block in chunk.written_blocks(block_size)}
        for each in self._windows:
            each.forget(written, but=continued if each is window else ())
        if window is None or not window.has_room_for(decodes):
            return GatheredDecodes(self._cache, decodes)
        return window.hold(decodes, continued)

    def _window_of(self, continued: Sequence[_Held]) -> "DecodeWindow":
        """The one that holds most of the rows, among equals the one that was used least lately."""
        window = max(self._windows, key=lambda one: one.num_held(continued))
        self._windows.remove(window)
        self._windows.append(window)
        return window


class DecodeWindow:
    """The contexts of one batch of rows, in a tensor [2, rows, K, tokens, D] for each layer."""

    def __init__(self, cache: PagedKVCache, max_tokens: int) -> None:
        self._cache = cache
        self._max_tokens = max_tokens
        self._num_rows = self._num_tokens = 0
        """The room that there is."""
        self._layers: list[Tensor] = []
        self._rows: list[_Held | None] = []
        self._views: dict[tuple[int, int], list[_View]] = {}

    def num_held(self, continued: Iterable[_Held]) -> int:
        """How many of these contexts are here."""
        return len({*self._rows} & {*continued})

    def forget(self, written: set[int], but: Sequence[_Held]) -> None:
        """Let go of rows whose blocks are written by a chunk that does not continue them."""
        kept = {*but}
        for place, row in enumerate(self._rows):
            if row is not None and row not in kept and not written.isdisjoint(row.blocks):
                self._rows[place] = None

    def has_room_for(self, chunks: Sequence[Chunk]) -> bool:
        """Whether the window may have the size of these rows."""
        rows, tokens = _size_of(chunks)
        return rows * tokens <= self._max_tokens

    def hold(self, chunks: Sequence[Chunk], continued: Sequence[_Held]) -> "WindowedDecodes":
        """Make exactly these decode rows the rows of the window; `continued`: their contexts until now."""
        self._make_room(*_size_of(chunks))
        places = self._arrange(continued)
        rows: dict[int, _Held] = {}
        for place, chunk in zip(places, chunks, strict=True):
            rows[place] = _Held(chunk.end, chunk.blocks_of(chunk.end, self._cache.block_size))
        self._rows = [rows[place] for place in range(len(chunks))]
        length = _rounded_up(max(chunk.end for chunk in chunks))
        return WindowedDecodes(self._views_of(len(chunks), length), places, chunks, self._starts_X)

    def _arrange(self, continued: Sequence[_Held]) -> list[int]:
        """Bring each context to a place of its own among the first; returns the places."""
        here: dict[_Held, list[int]] = {}
        for place, row in enumerate(self._rows):
            if row is not None:
                here.setdefault(row, []).append(place)
        found = [here[row].pop() if here.get(row) else None for row in continued]
        free = sorted({*range(len(continued))} - {*found}, reverse=True)
        places = []
        for row, origin in zip(continued, found, strict=True):
            stays = origin is not None and origin < len(continued)
            places.append(origin if origin is not None and stays else free.pop())
            if origin is None:
                self._fill(places[-1], row)
            elif not stays:
                self._move(origin, places[-1])
        return places

    def _fill(self, place: int, row: _Held) -> None:
        """Copy a context from the cache, and zeros behind it: a mask takes no NaN away."""
        blocks = self._cache.integers(row.blocks)
        for layer, room in enumerate(self._layers):
            room[:, place, :, row.num_tokens :].zero_()
            if row.num_tokens:
                context_XLD = self._cache.gather(layer, blocks)[:, : row.num_tokens]
                context = context_XLD.reshape(2, -1, row.num_tokens, self._cache.head_dim)
                room[:, place, :, : row.num_tokens] = context

    def _move(self, origin: int, place: int) -> None:
        for room in self._layers:
            room[:, place] = room[:, origin]

    def _make_room(self, rows: int, tokens: int) -> None:
        """Grow to room for so many, by half at least, as growing copies everything; rows that fit stay."""
        if rows <= self._num_rows and tokens <= self._num_tokens:
            return
        grown = (_grown(self._num_rows, rows), _rounded_up(_grown(self._num_tokens, tokens)))
        if grown[0] * grown[1] <= self._max_tokens:
            self._resize(*grown)
        else:
            self._num_rows, self._num_tokens, self._layers, self._rows = 0, 0, [], []
            self._resize(rows, tokens)

    def _resize(self, num_rows: int, num_tokens: int) -> None:
        cache, before = self._cache, self._layers
        shape = (2, num_rows, cache.num_kv_heads, num_tokens, cache.head_dim)
        self._layers = [cache.zeros(shape) for _ in range(cache.num_layers)]
        for room, old in zip(self._layers, before, strict=False):
            room[:, : self._num_rows, :, : self._num_tokens] = old
        self._num_rows, self._num_tokens = num_rows, num_tokens
        self._views.clear()
        heads = torch.arange(cache.num_kv_heads, device=cache.device) * num_tokens
        halves = torch.arange(2, device=cache.device) * num_rows * cache.num_kv_heads * num_tokens
        self._starts_X = (halves.unsqueeze(1) + heads).flatten()

    def _views_of(self, num_rows: int, length: int) -> "list[_View]":
        if (num_rows, length) not in self._views:
            self._views.clear()
            self._views[num_rows, length] = [_View.of(room, num_rows, length) for room in self._layers]
        return self._views[num_rows, length]


@dataclass(frozen=True, slots=True)
class _View:
    """One layer of a window."""

    flat: Tensor
    """All of it, a row for each head of each token."""
    key_BKLD: Tensor
    value_BKLD: Tensor

    @staticmethod
    def of(room: Tensor, num_rows: int, length: int) -> "_View":
        key, value = room[:, :num_rows, :, :length].unbind()
        return _View(room.view(-1, room.size(-1)), key, value)


class WindowedDecodes:
    """Implements `DecodeAttention` for rows that are in a window, `places[row]` for each."""

    def __init__(
        self, layers: list[_View], places: Sequence[int], chunks: Sequence[Chunk], starts_X: Tensor
    ) -> None:
        self._layers = layers
        device = starts_X.device
        place_B, end_B = torch.tensor((places, [chunk.end for chunk in chunks]), device=device)
        self._length = layers[0].key_BKLD.size(2)
        row_stride = layers[0].key_BKLD.stride(0) // layers[0].key_BKLD.size(3)
        self._targets = ((place_B * row_stride + end_B - 1).unsqueeze(1) + starts_X).flatten()
        in_order = list(places) == list(range(len(places)))
        self._place_B = None if in_order else place_B
        self._row_B = None if in_order else place_B.argsort()
        self._ends_B111 = (end_B if self._row_B is None else end_B[self._row_B]).view(-1, 1, 1, 1)
        self._masks: dict[int | None, Tensor] = {}

    def attend(
        self,
        layer: int,
        query_BND: Tensor,
        key_value_BXD: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
    ) -> Tensor:
        """See `DecodeAttention.attend`."""
        view = self._layers[layer]
        view.flat.index_copy_(0, self._targets, key_value_BXD.reshape(-1, key_value_BXD.size(-1)))
        if sliding_window not in self._masks:
            self._masks[sliding_window] = decode_mask(
                self._ends_B111, self._length, sliding_window, query_BND
            )
        if self._row_B is not None:
            query_BND = query_BND[self._row_B]
        mask = self._masks[sliding_window]
        output = attend_rows(query_BND, view.key_BKLD, view.value_BKLD, mask, scaling)
        return output if self._place_B is None else output[self._place_B]


def _size_of(chunks: Sequence[Chunk]) -> tuple[int, int]:
    """Rows, and tokens of the longest."""
    return len(chunks), _rounded_up(max(chunk.end for chunk in chunks))


def _grown(size: int, needed: int) -> int:
    return size if needed <= size else max(needed, size + size // 2)


def _rounded_up(num_tokens: int) -> int:
    return -(-num_tokens // _GRAIN_TOKENS) * _GRAIN_TOKENS
