"""One decode step: a stage's forward alone against `generate()`, in turn in one process.

The forward has one thread, as a stage worker by default. Both sides count the processor time of the thread
that computes, too, which says more than the clock where others use the machine.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from benchmarks.models import model_folder
from services.stage_worker.compute.attention.iteration import PagedAttention
from services.stage_worker.compute.attention.windows import WindowedDecoder
from services.stage_worker.compute.kv_cache import PagedKVCache
from shared.model.fast_inference import enable_fast_inference
from shared.model.loader import load_stage, model_partition, read_config

CASES = ((1, 190), (8, 190), (8, 500), (32, 190))
"""Rows, and tokens of context at the first step."""
STEPS, BLOCK_SIZE = 8, 16
NUM_ROUNDS = {"small": 12, "big": 4}

Times = list[tuple[float, float]]
"""Seconds of each step, by the clock and of the processor."""


def now() -> tuple[float, float]:
    return time.perf_counter(), time.thread_time()


def between(moments: list[tuple[float, float]]) -> Times:
    return [(later[0] - one[0], later[1] - one[1]) for one, later in pairwise(moments)]


class _Clock(BaseStreamer):
    """Notes when each step of tokens went past; the prompt is the first."""

    def __init__(self) -> None:
        self.moments: list[tuple[float, float]] = []

    def put(self, value: torch.Tensor) -> None:
        self.moments.append(now())

    def end(self) -> None:
        """Nothing is held back."""


def generate_steps(model: Any, num_rows: int, context: int) -> Times:
    """Greedy decoding; the prompts' own forward is left out."""
    clock, prompts = _Clock(), torch.randint(0, model.config.vocab_size, (num_rows, context))
    model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=STEPS + 1,
        do_sample=False,
        streamer=clock,
    )
    return between(clock.moments[1:])


def stage_steps(folder: Path) -> Callable[[int, int], Times]:
    """Steps of the whole model as one stage, with greedy draws, over contexts of zeros."""
    config = read_config(folder)
    (layers,) = model_partition(config, 1)
    stage = load_stage(folder, layers)
    enable_fast_inference(stage).prepare()
    num_kv_heads, num_blocks = config.num_key_value_heads, 32 * 40
    head_dim = config.hidden_size // config.num_attention_heads
    cache = PagedKVCache(layers.num_layers, num_blocks, BLOCK_SIZE, num_kv_heads, head_dim)
    blocks = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).view(32, 40).tolist()
    decoder = WindowedDecoder(cache)

    @torch.inference_mode()
    def step(num_rows: int, place: int) -> None:
        attention = PagedAttention(cache, [(place, 1, blocks[row]) for row in range(num_rows)], decoder)
        tokens, places = torch.zeros(num_rows, dtype=torch.int64), torch.full((num_rows,), place)
        stage.forward(tokens, places, attention).argmax(-1).tolist()

    def steps(num_rows: int, context: int) -> Times:
        step(num_rows, context - 1)  # brings the rows together, as the first token of a request does
        moments = [now()]
        for place in range(context, context + STEPS):
            step(num_rows, place)
            moments.append(now())
        return between(moments)

    return steps


def forward(name: str, folder: Path) -> dict[str, Any]:
    """Medians in ms, by rows and context; and how many times as fast the stage is as `generate()`."""
    torch.set_num_threads(1)
    steps, model = stage_steps(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    measured: dict[tuple[str, int, int], Times] = {}
    for _ in range(NUM_ROUNDS[name]):
        for num_rows, context in CASES:
            measured.setdefault(("stage", num_rows, context), []).extend(steps(num_rows, context))
            measured.setdefault(("generate", num_rows, context), []).extend(
                generate_steps(model, num_rows, context)
            )
    return dict(_summaries(measured))


def _summaries(measured: dict[tuple[str, int, int], Times]) -> Iterator[tuple[str, dict[str, float]]]:
    for num_rows, context in CASES:
        stage, generate = (
            [statistics.median(times) for times in zip(*measured[side, num_rows, context], strict=True)]
            for side in ("stage", "generate")
        )
        yield (
            f"{num_rows} rows, {context} tokens",
            {
                "stage_ms": 1e3 * stage[0],
                "generate_ms": 1e3 * generate[0],
                "stage_processor_ms": 1e3 * stage[1],
                "generate_processor_ms": 1e3 * generate[1],
                "times_as_fast": generate[0] / stage[0],
                "times_as_fast_by_processor": generate[1] / stage[1],
            },
        )


async def main(work: Path) -> dict[str, Any]:
    """Measure each model."""
    return {name: forward(name, model_folder(name, work / "models")) for name in NUM_ROUNDS}
