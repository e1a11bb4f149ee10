"""Decode steps that are captured as CUDA graphs, against the same stage run as it comes."""

from pathlib import Path

import pytest
import torch

from services.stage_worker.compute.attention.chunks import Chunk
from services.stage_worker.compute.attention.iteration import PagedAttention
from services.stage_worker.compute.decode_step import DecodeStep
from services.stage_worker.compute.graphs import GraphCapture
from services.stage_worker.compute.kv_cache import PagedKVCache
from services.stage_worker.compute.streams import Streams, streams_for
from services.stage_worker.compute.weights import StageWeights
from services.stage_worker.training.optimizers import OptimizerSettings
from shared.model.attention import PackedSegments
from shared.model.loader import load_stage, model_partition, read_config
from shared.model.stage import Stage
from tests.support.models import save_tiny_model
from tests.support.training import training_forward

DEVICE, BLOCK_SIZE, PROMPT_LENGTH = "cuda:0", 16, 20

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama_tied", "mistral", "gpt2"])
def test_after_a_publish_logprobs_under_graphs_are_the_eager_ones(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    save_tiny_model(family, tmp_path)
    streams = streams_for(torch.device(DEVICE))
    with streams.changing():
        stage, weights, cache = loaded(tmp_path, dtype)
    blocks = [[5, 9, 1], [2, 30, 4], [7, 8, 40]]
    with torch.inference_mode(), streams.serving():
        step = DecodeStep(stage, cache, max_rows=4, max_blocks=4, dtype=dtype)
        step.prepare(GraphCapture(torch.device(DEVICE)))
        tokens = torch.arange(3 * PROMPT_LENGTH, device=DEVICE) % stage.vocab_size
        positions = torch.arange(PROMPT_LENGTH, device=DEVICE).repeat(3)
        prompts = [(0, PROMPT_LENGTH, own) for own in blocks]
        stage.forward(tokens, positions, PagedAttention(cache, prompts))
    for number in range(1, 4):
        chunks = [Chunk(PROMPT_LENGTH + number - 1, 1, own) for own in blocks]
        with torch.inference_mode(), streams.serving():
            newest, places = torch.tensor([3, 1, 2], device=DEVICE), cache.integers([chunks[0].start] * 3)
            eager = stage.forward(newest, places, PagedAttention(cache, chunks)).log_softmax(-1)
            bucket = step.bucket_of(chunks)
            assert bucket is not None
            replayed = step.run(bucket, chunks, newest.tolist()).log_softmax(-1)
            tolerance = 1e-4 if dtype == torch.float32 else 5e-2
            torch.testing.assert_close(replayed, eager, rtol=0, atol=tolerance)
        publish(stage, weights, number, streams)


def loaded(folder: Path, dtype: torch.dtype) -> tuple[Stage, StageWeights, PagedKVCache]:
    """The one stage of the model in the folder."""
    (layers,) = model_partition(read_config(folder), 1)
    stage = load_stage(folder, layers, device=DEVICE)
    weights = StageWeights(stage, OptimizerSettings(), version=0, dtype=dtype, in_place=True)
    num_kv_heads = getattr(stage.config, "num_key_value_heads", None) or stage.config.num_attention_heads
    head_dim = stage.hidden_size // stage.config.num_attention_heads
    cache = PagedKVCache(layers.num_layers, 64, BLOCK_SIZE, num_kv_heads, head_dim, dtype, DEVICE)
    return stage, weights, cache


def publish(stage: Stage, weights: StageWeights, version: int, streams: Streams) -> None:
    """Train on a few tokens, and step."""
    tokens = torch.arange(8, device=DEVICE)
    with training_forward(weights) as used:
        logits = stage.forward(tokens, tokens, PackedSegments((8,)))
    torch.autograd.backward(logits.float().logsumexp(-1).sum() - logits.float()[:, 5].sum())
    weights.backward_done(used)
    weights.finish_batch(f"b{version}")
    with streams.changing():
        weights.step(f"b{version}", 1e-2, version=version)
