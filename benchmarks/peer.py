"""The other side of each comparison: plain transformers and PyTorch in one process with two threads.

`python -m benchmarks.peer generate|train FOLDER DEVICE DTYPE` loads the model, says `ready`, and then answers
each line on stdin with one JSON line of measurements, so that runs of both sides can alternate.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from benchmarks.workload import (
    BATCH_SIZE,
    LEARNING_RATE,
    MAX_TOKENS,
    NUM_EXAMPLES,
    example_tokens,
    prompt_tokens,
)

NUM_THREADS = 2


class _Clock(BaseStreamer):
    """Notes when the prompt and each following step of tokens went past."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def generate_measurer(
    folder: str, device: torch.device, dtype: torch.dtype
) -> Callable[[], dict[str, float]]:
    """Greedy `generate()` at batch 8; the first token's time is taken inside the same run."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.to(device)
    prompts = torch.tensor(prompt_tokens(model.config.vocab_size), device=device)
    mask = torch.ones_like(prompts)

    def measure() -> dict[str, float]:
        clock, start_s = _Clock(), time.perf_counter()
        model.generate(
            prompts, attention_mask=mask, max_new_tokens=MAX_TOKENS, do_sample=False, streamer=clock
        )
        first_s, last_s = clock.times_s[1], clock.times_s[-1]
        assert len(clock.times_s) == 1 + MAX_TOKENS, "the model ended a completion by itself"
        return {
            "decode_tokens_per_s": BATCH_SIZE * (MAX_TOKENS - 1) / (last_s - first_s),
            "tokens_per_s": BATCH_SIZE * MAX_TOKENS / (last_s - start_s),
        }

    return measure


def training_measurer(
    folder: str, device: torch.device, dtype: torch.dtype
) -> Callable[[], dict[str, float]]:
    """The plain loop: forward, backward, fused AdamW, one step a batch; bfloat16 by torch's autocast."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )

    def measure() -> dict[str, float]:
        start_s = time.perf_counter()
        for number in range(2):
            tokens = torch.tensor(example_tokens(model.config.vocab_size, number), device=device)
            with autocast:
                logits = model(tokens).logits[:, :-1]
                loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return {"tokens_per_s": 2 * NUM_EXAMPLES * len(tokens[0]) / (time.perf_counter() - start_s)}

    return measure


def main(kind: str, folder: str, device: str, dtype: str) -> None:
    torch.set_num_threads(NUM_THREADS)
    measurer = {"generate": generate_measurer, "train": training_measurer}[kind]
    measure = measurer(folder, torch.device(device), getattr(torch, dtype))
    measure()
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        print(json.dumps(measure()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
