"""The price of packing and unpacking messages that come once per token, iteration or microbatch."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.report import spread
from shared.messages.base import Message
from shared.messages.events import OpEnded, OpStarted, StageOp, StageProgress
from shared.messages.inference import (
    InferenceTask,
    Iteration,
    IterationDone,
    IterationForward,
    NewBlocks,
    SampledToken,
    Sampling,
    SequenceResult,
    TokenLogprob,
    TokensProduced,
)
from shared.messages.training import Microbatch, MicrobatchForward
from shared.tensors.ref import TensorRef

NUM_ROUNDS, BYTES_PER_ROUND = 15, 100_000
SAMPLING = Sampling(max_tokens=128, seed=123456, stop_token_ids=(0, 2))
HIDDEN = TensorRef(carrier="shm", shape=(32, 576), dtype="float32", size_bytes=73728, place="arena", slot=1)


def task_id(number: int) -> str:
    return f"cmpl-0123456789abcdef-{number}"


def iteration(num_sequences: int) -> Iteration:
    """All decode, and every sixteenth one begins a new block."""
    grown = range(0, num_sequences, 16)
    return Iteration(
        number=700,
        sequences=tuple(range(300, 300 + num_sequences)),
        starts=(200,) * num_sequences,
        counts=(1,) * num_sequences,
        produces=(True,) * num_sequences,
        new_blocks=tuple(NewBlocks(place=place, first=12, blocks=(500,)) for place in grown),
    )


def tokens_of(num_sequences: int) -> TokensProduced:
    results = (
        SequenceResult(task_id=task_id(number), token=TokenLogprob(token=number), index=17)
        for number in range(num_sequences)
    )
    return TokensProduced(node=0, weights_version=12, results=tuple(results))


def progress() -> StageProgress:
    op = StageOp(
        kind="iteration",
        task_ids=tuple(map(task_id, range(8))),
        index=3,
        num_tokens=8,
        num_pairs=800,
        num_sequences=8,
        num_context_tokens=800,
    )
    ended = tuple(OpEnded(op=op, elapsed_s=0.01, ago_s=0.0) for _ in range(4))
    return StageProgress(node=0, stage=1, ended=ended, running=OpStarted(op=op, ago_s=0.001))


def microbatch(num_tokens: int) -> MicrobatchForward:
    rows = tuple(range(num_tokens))
    head = Microbatch(
        fence=1,
        batch_id="batch",
        index=0,
        count=4,
        lengths=(num_tokens,),
        label_rows=rows[:-1],
        labels=rows[1:],
        loss_weight=1 / num_tokens,
    )
    return MicrobatchForward(microbatch=head, tokens=rows)


def messages() -> dict[str, Message]:
    sampled = (SampledToken(sequence=300 + number, token=number, finished=False) for number in range(32))
    return {
        "request_of_1000_tokens": InferenceTask(
            task_id=task_id(0),
            gateway="gateway",
            prompt=tuple(range(1000)),
            sampling=SAMPLING,
            timeout_s=60.0,
        ),
        "iteration_of_32_sequences": IterationForward(iteration=iteration(32), hidden=HIDDEN),
        "iteration_done_of_32_sequences": IterationDone(iteration=7, tokens=tuple(sampled)),
        "tokens_of_8_sequences": tokens_of(8),
        "progress_of_4_ops": progress(),
        "microbatch_of_512_tokens": microbatch(512),
    }


def cost_us(work: Callable[[], object], num_calls: int) -> dict[str, float]:
    """The median of the rounds, with its spread."""
    rounds = []
    for _ in range(NUM_ROUNDS):
        began_s = time.perf_counter()
        for _ in range(num_calls):
            work()
        rounds.append((time.perf_counter() - began_s) / num_calls * 1e6)
    return spread(rounds)


async def main(_: Path) -> dict[str, Any]:
    """For each message its size and what both ways take, in microseconds."""
    results = {}
    for name, message in messages().items():
        body = message.pack()
        num_calls = max(10, BYTES_PER_ROUND // len(body))
        results[name] = {
            "size_bytes": len(body),
            "pack_us": cost_us(message.pack, num_calls),
            "unpack_us": cost_us(partial(type(message).unpack, body), num_calls),
        }
    return results
