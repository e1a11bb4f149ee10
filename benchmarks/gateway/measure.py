"""One gateway process under 1,000 streams: how late tokens are, and what one costs the processor."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gateway.workload import (
    NUM_STREAMS,
    NUM_TOKENS,
    PROMPT_EVERY_S,
    PROMPTED,
    PUBLISHED,
    RECEIVED,
    TOKENS_PER_S,
    model_folder,
)
from benchmarks.report import spread
from lemix.nats_server import NatsServer
from lemix.ports import claim_port

HOST = "127.0.0.1"
NUM_ROUNDS = 3
START_DEADLINE_S, ROUND_DEADLINE_S = 60.0, 180.0
NUM_PROMPTS = int(NUM_TOKENS * NUM_STREAMS / TOKENS_PER_S / PROMPT_EVERY_S)
SOON_S = 0.1
"""Tokens published so soon after a long prompt was sent count as touched by it."""


async def main(work: Path) -> dict[str, Any]:
    """Rounds in turn: streams alone, and streams beside long prompts."""
    folder = work / "gateway"
    model, port = model_folder(folder), claim_port(HOST, 0)
    quiet, beside = [], []
    async with NatsServer(folder / "nats") as server, gateway(server.url, model, folder, port) as pid:
        for _ in range(NUM_ROUNDS):
            quiet.append(await one_round(server.url, model, folder, port, pid, num_prompts=0))
            beside.append(await one_round(server.url, model, folder, port, pid, num_prompts=NUM_PROMPTS))
    return {"streams_alone": over_rounds(quiet), "beside_long_prompts": over_rounds(beside)}


def over_rounds(rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: spread([one[name] for one in rounds]) for name in rounds[0]}


async def one_round(
    url: str, model: Path, folder: Path, port: int, gateway_pid: int, *, num_prompts: int
) -> dict[str, float]:
    """All streams from their first token to their last."""
    async with (
        asyncio.timeout(ROUND_DEADLINE_S),
        process("stages", url, model, folder, gateway_pid) as stages,
    ):
        assert stages.stdout is not None
        await stages.stdout.readline()
        async with process("clients", HOST, port, model, folder, num_prompts) as clients:
            said = json.loads(await stages.stdout.readline())
            if await clients.wait() or await stages.wait():
                raise RuntimeError("clients or stages failed")
    return figures(folder, said)


def figures(folder: Path, said: dict[str, float]) -> dict[str, float]:
    """The figures of a round: delays in milliseconds, processor time in microseconds.

    Last tokens are apart: all streams end within 0.2 s, as no load does, and an end costs more than a token.
    """
    published, received = np.load(folder / PUBLISHED), np.load(folder / RECEIVED)
    delays_ms = (received - published) * 1e3
    assert delays_ms.min() > 0, "every token came, and none before it was published"
    result = {
        **percentiles("delay_ms", delays_ms[:, :-1]),
        **percentiles("delay_of_last_token_ms", delays_ms[:, -1]),
        "gateway_processor_us_per_token": said["processor_s"] * 1e6 / delays_ms.size,
        "stages_late_ms": said["late_s"] * 1e3,
    }
    prompted = np.load(folder / PROMPTED)
    if prompted.size:
        since_s = published[..., None] - prompted[:, 0]
        touched = ((since_s >= 0) & (since_s < SOON_S)).any(axis=-1)[:, :-1]
        result |= percentiles("delay_after_a_prompt_ms", delays_ms[:, :-1][touched])
        result["prompt_answered_ms"] = float(np.median(prompted[:, 1] - prompted[:, 0]) * 1e3)
    return result


def percentiles(name: str, values: Any) -> dict[str, float]:
    return {
        f"{name}_p50": float(np.percentile(values, 50)),
        f"{name}_p99": float(np.percentile(values, 99)),
        f"{name}_max": float(np.max(values)),
    }


@asynccontextmanager
async def process(name: str, *arguments: object) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process of this benchmark; ended on exit."""
    running = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"benchmarks.gateway.{name}", *map(str, arguments)),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield running
    finally:
        if running.returncode is None:
            running.kill()
            await running.wait()


@asynccontextmanager
async def gateway(url: str, model: Path, folder: Path, port: int) -> AsyncIterator[int]:
    """The gateway as it is in production; ready, ended on exit. Its process's id."""
    settings = {"NATS_URL": url, "MODEL": model, "RUN_DIR": folder, "HOST": HOST, "PORT": port}
    running = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.gateway"),
        env={**os.environ, **{f"LEMIX_{name}": str(value) for name, value in settings.items()}},
    )
    try:
        async with asyncio.timeout(START_DEADLINE_S):
            while not await listens(port):  # noqa: ASYNC110 - of another process
                await asyncio.sleep(0.1)
        yield running.pid
    finally:
        running.terminate()
        await running.wait()


async def listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(HOST, port)
    except OSError:
        return False
    writer.close()
    return True
