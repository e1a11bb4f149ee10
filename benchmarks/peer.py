"""The other side of each comparison: plain transformers and PyTorch in one process with two threads.

`python -m benchmarks.peer generate|train FOLDER` loads the model, says `ready`, and then answers each line
on stdin with one JSON line of measurements, so that runs of both sides can alternate.
"""

import json
import sys
import time
from collections.abc import Callable

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from benchmarks.workload import (
    BATCH_SIZE,
    LEARNING_RATE,
    MAX_TOKENS,
    NUM_EXAMPLES,
    example_tokens,
    prompt_tokens,
)

NUM_THREADS = 2


def generate_measurer(folder: str) -> Callable[[], dict[str, float]]:
    """Greedy `generate()` at batch 8: whole time, and the time of the first token alone."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompts = torch.tensor(prompt_tokens(model.config.vocab_size))
    mask = torch.ones_like(prompts)

    def timed(max_new_tokens: int) -> float:
        start_s = time.perf_counter()
        model.generate(prompts, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
        return time.perf_counter() - start_s

    def measure() -> dict[str, float]:
        first_s, whole_s = timed(1), timed(MAX_TOKENS)
        return {
            "decode_tokens_per_s": BATCH_SIZE * (MAX_TOKENS - 1) / (whole_s - first_s),
            "tokens_per_s": BATCH_SIZE * MAX_TOKENS / whole_s,
        }

    return measure


def training_measurer(folder: str) -> Callable[[], dict[str, float]]:
    """The plain loop: forward, backward, fused AdamW, one step a batch."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )

    def measure() -> dict[str, float]:
        start_s = time.perf_counter()
        for number in range(2):
            tokens = torch.tensor(example_tokens(model.config.vocab_size, number))
            logits = model(tokens).logits[:, :-1]
            functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {"tokens_per_s": 2 * NUM_EXAMPLES * len(tokens[0]) / (time.perf_counter() - start_s)}

    return measure


def main(kind: str, folder: str) -> None:
    torch.set_num_threads(NUM_THREADS)
    measure = {"generate": generate_measurer, "train": training_measurer}[kind](folder)
    measure()
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        print(json.dumps(measure()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
