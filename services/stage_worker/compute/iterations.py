"""Runs iterations of sequences on one stage, each in the way that is fastest for it.

Shape letters: T rows of an iteration, R rows of logits, H hidden size, V vocabulary.
"""

import logging
from collections.abc import Sequence
from typing import Final, TypeAlias

import torch
from torch import Tensor

from services.stage_worker.compute.attention.choice import decoder_for
from services.stage_worker.compute.attention.chunks import Chunk
from services.stage_worker.compute.attention.iteration import PagedAttention
from services.stage_worker.compute.attention.kernels import kernel_for
from services.stage_worker.compute.decode_step import Bucket, DecodeStep
from services.stage_worker.compute.executor import SequenceChunk
from services.stage_worker.compute.graphs import Capture
from services.stage_worker.compute.kv_cache import PagedKVCache
from services.stage_worker.compute.readback import Readback
from services.stage_worker.compute.sampling.step import Drawing
from services.stage_worker.compute.weights import StageWeights
from shared.errors import CarrierError
from shared.model.attention import AttentionContext, PackedSegments
from shared.model.stage import Stage

logger = logging.getLogger(__name__)

MAX_STEP_ROWS: Final = 64
MAX_STEP_TOKENS: Final = 4096
"""Iterations of more rows or longer contexts run as they come: their launches are a small part of them."""

Inputs: TypeAlias = Sequence[int] | Tensor
"""Token ids at the first stage, hidden states [T, H] at the others."""


class IterationRunner:
    """All methods belong to the compute thread."""

    def __init__(self, stage: Stage, cache: PagedKVCache, weights: StageWeights, dtype: torch.dtype) -> None:
        self._stage = stage
        self._cache = cache
        self._weights = weights
        self._dtype = dtype
        config = stage.config
        window = getattr(config, "sliding_window", None)
        self._kernel = kernel_for(cache, config.num_attention_heads, window)
        self._decoder = decoder_for(cache, stage.layers.num_stages, self._kernel)
        self._step: DecodeStep | None = None

    def warm_up(self) -> None:
        """Allocator and kernels are paid for before the first request."""
        for start, num_tokens in ((0, 2), (2, 1)):
            rows = torch.zeros(num_tokens, dtype=torch.int64, device=self._cache.device)
            hidden = rows.unsqueeze(1).expand(-1, self._stage.hidden_size).to(self._dtype)
            inputs = rows if self._stage.layers.is_first else hidden
            attention = PagedAttention(self._cache, [(start, num_tokens, (0,))])
            with torch.inference_mode():
                self._stage.forward(inputs, rows + start, attention)

    def use_steps(self, capture: Capture) -> None:
        """From now on decode rows alone run in static steps; before any training, for it needs much memory.

        A model that cannot be captured runs without.
        """
        num_blocks = min(MAX_STEP_TOKENS // self._cache.block_size, self._cache.dummy_block)
        step = DecodeStep(
            self._stage,
            self._cache,
            max_rows=MAX_STEP_ROWS,
            max_blocks=num_blocks,
            dtype=self._dtype,
            kernel=self._kernel,
        )
        try:
            with torch.inference_mode():
                step.prepare(capture)
        except RuntimeError as error:
            logger.warning("decode steps are not captured, and so slower: %s", error)
            return
        self._step = step

    @property
    def goes_ahead(self) -> bool:
        """Whether steps can go on from tokens that the host has not seen (`draw_on`)."""
        return self._step is not None and self._stage.layers.num_stages == 1

    def uses_steps_for(self, version: int | None) -> bool:
        """Whether decode rows that run with this version may run in static steps."""
        return self._step is not None and self._weights.are_in_place(version)

    def run(
        self,
        chunks: Sequence[SequenceChunk],
        inputs: Inputs,
        logit_rows: Sequence[int],
        version: int | None,
    ) -> Tensor:
        """The stage's outputs: hidden states [T, H], or at the last stage the logits [R, V] of these rows.

        Raises CarrierError when a chunk has no room in the cache, VersionGoneError when the version is gone.
        """
        pieces = pieces_of(chunks)
        has_blocks = any(piece.start or piece.blocks for piece in pieces)
        if has_blocks:
            self._check_blocks(chunks)
        with torch.inference_mode(), self._weights.serving(version):
            if self._step is not None and (bucket := self._bucket_of(pieces, version)) is not None:
                return self._chosen(self._step.run(bucket, pieces, inputs), logit_rows)
            return self._run_as_they_come(pieces, inputs, logit_rows, has_blocks=has_blocks)

    def draw(
        self,
        chunks: Sequence[SequenceChunk],
        inputs: Inputs,
        drawings: Sequence[Drawing],
        version: int | None,
    ) -> Readback | None:
        """At the last stage: tokens that a static step draws for these chunks; None: no step takes them.

        Raises the errors of `run`.
        """
        pieces = pieces_of(chunks)
        bucket = self._bucket_of(pieces, version)
        if self._step is None or bucket is None:
            return None
        self._check_blocks(chunks)
        with torch.inference_mode():
            self._step.run(bucket, pieces, inputs)
            return self._step.draw(bucket, drawings)

    def draw_on(
        self, pieces: Sequence[Chunk], rows: Sequence[int], drawings: Sequence[Drawing]
    ) -> Readback | None:
        """The same where the token of each piece is the one that was drawn last for the row in `rows`."""
        bucket = self._bucket_of(pieces, None)
        if self._step is None or bucket is None:
            return None
        with torch.inference_mode():
            self._step.run_on(bucket, pieces, rows)
            return self._step.draw(bucket, drawings)

    def _bucket_of(self, pieces: Sequence[Chunk], version: int | None) -> Bucket | None:
        """The size of the static step that takes these; None: they run as they come."""
        if self._step is None or not self.uses_steps_for(version):
            return None
        return self._step.bucket_of(pieces) if all(piece.blocks for piece in pieces) else None

    def _run_as_they_come(
        self, pieces: Sequence[Chunk], inputs: Inputs, logit_rows: Sequence[int], *, has_blocks: bool
    ) -> Tensor:
        attention: AttentionContext
        if has_blocks:
            attention = PagedAttention(self._cache, pieces, self._decoder)
        else:  # whole prompts that leave nothing in the cache
            attention = PackedSegments(tuple(piece.num_tokens for piece in pieces))
        positions = [place for piece in pieces for place in range(piece.start, piece.end)]
        integers = self._cache.integers
        rows = inputs if isinstance(inputs, Tensor) else integers(inputs)
        return self._stage.forward(rows, integers(positions), attention, integers(logit_rows))

    def _chosen(self, outputs: Tensor, logit_rows: Sequence[int]) -> Tensor:
        """A step's outputs as a forward has them, in memory that the next step leaves alone."""
        if not self._stage.layers.is_last:
            return outputs.clone()
        return outputs if len(logit_rows) == len(outputs) else outputs[self._cache.integers(logit_rows)]

    def _check_blocks(self, chunks: Sequence[SequenceChunk]) -> None:
        """Raises CarrierError: rows without room here would end the process, on a GPU beyond repair."""
        num_blocks, block_size = self._cache.dummy_block, self._cache.block_size
        for chunk in chunks:
            has_room = chunk.start + chunk.num_tokens <= len(chunk.blocks) * block_size
            if not has_room or min(chunk.blocks) < 0 or max(chunk.blocks) >= num_blocks:
                raise CarrierError(f"{chunk.task_id} has no room in the KV cache of this stage")


def pieces_of(chunks: Sequence[SequenceChunk]) -> list[Chunk]:
    """The chunks as attention sees them."""
    return [Chunk(chunk.start, chunk.num_tokens, chunk.blocks) for chunk in chunks]
