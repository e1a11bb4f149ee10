"""Scheduler and stages of the benchmark in one process: take every request, send tokens at a fixed pace."""

import asyncio
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import uvloop

from benchmarks.gateway.workload import (
    NUM_STREAMS,
    NUM_TOKENS,
    PUBLISHED,
    SEQUENCES_PER_ITERATION,
    TOKENS_PER_S,
    tokens_of,
    words,
)
from shared.bus.base import Incoming
from shared.bus.nats import NatsBus
from shared.messages.inference import InferenceTask, Placed, SequenceResult, TokenLogprob, TokensProduced
from shared.subjects import SUBMIT, TOKENS

STEP_S = NUM_STREAMS / TOKENS_PER_S
"""Between two tokens of a stream."""


class Stages:
    """A stream's prompt is one token, which tells its number. Longer prompts get one token, at once."""

    def __init__(self, bus: NatsBus, model: Path) -> None:
        self._bus = bus
        known = words(model)
        self._stream_of = {token: stream for stream, token in enumerate(known[:NUM_STREAMS])}
        self._tokens = [tokens_of(stream, known) for stream in range(NUM_STREAMS)]
        self._tasks: dict[int, InferenceTask] = {}
        self.all_here = asyncio.Event()
        self.published = np.zeros((NUM_STREAMS, NUM_TOKENS))

    async def place(self, incoming: Incoming[InferenceTask]) -> Placed:
        task = incoming.message
        if len(task.prompt) > 1:
            result = SequenceResult(task_id=task.task_id, token=TokenLogprob(token=0), finish="length")
            await self._publish(task.gateway, [result])
        else:
            self._tasks[self._stream_of[task.prompt[0]]] = task
            if len(self._tasks) == NUM_STREAMS:
                self.all_here.set()
        return Placed(node=0)

    async def run(self) -> float:
        """Say all tokens. Returns the most that a message was late, in seconds."""
        groups = np.array_split(np.arange(NUM_STREAMS), -(-NUM_STREAMS // SEQUENCES_PER_ITERATION))
        began_s, late_s = time.monotonic(), 0.0
        for index in range(NUM_TOKENS):
            for number, streams in enumerate(groups):
                due_s = began_s + STEP_S * (index + number / len(groups))
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                late_s = max(late_s, time.monotonic() - due_s)
                await self._say(index, streams)
        return late_s

    async def _say(self, index: int, streams: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> None:
        results = [self._result(int(stream), index) for stream in streams]
        self.published[streams, index] = time.monotonic()
        await self._publish(self._tasks[int(streams[0])].gateway, results)

    def _result(self, stream: int, index: int) -> SequenceResult:
        return SequenceResult(
            task_id=self._tasks[stream].task_id,
            token=TokenLogprob(token=self._tokens[stream][index]),
            index=index,
            finish="length" if index + 1 == NUM_TOKENS else None,
        )

    async def _publish(self, gateway: str, results: list[SequenceResult]) -> None:
        message = TokensProduced(node=0, weights_version=1, results=tuple(results))
        await self._bus.publish(TOKENS.at(gateway=gateway), message)


def processor_s(pid: int) -> float:
    """Processor time of a process so far, all its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def main(url: str, model: Path, folder: Path, gateway_pid: int) -> None:
    bus = await NatsBus.connect(url, name="stages")
    stages = Stages(bus, model)
    await bus.respond(SUBMIT.at(), stages.place)
    print("ready", flush=True)
    await stages.all_here.wait()
    await asyncio.sleep(1.0)  # until the gateway has nothing else to do
    before_s = processor_s(gateway_pid)
    late_s = await stages.run()
    await asyncio.sleep(0.2)
    np.save(folder / PUBLISHED, stages.published)
    print(json.dumps({"processor_s": processor_s(gateway_pid) - before_s, "late_s": late_s}), flush=True)
    await bus.close()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])))
