"""Runs `benchmarks.peer` beside the system and asks it to measure when it is its turn."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

ANSWER_DEADLINE_S = 300.0


class Peer:
    """A loaded peer, idle until asked."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def measure(self) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        await self._process.stdin.drain()
        return await self.answer()

    async def answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        async with asyncio.timeout(ANSWER_DEADLINE_S):
            answer: dict[str, float] = json.loads(await self._process.stdout.readline())
        return answer


@asynccontextmanager
async def running_peer(kind: str, folder: Path, device: str, dtype: str) -> AsyncIterator[Peer]:
    """A peer process of that kind, ready; ended on exit."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.peer", kind, str(folder), device, dtype),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        peer = Peer(process)
        await peer.answer()
        yield peer
    finally:
        process.kill()
        await process.wait()
