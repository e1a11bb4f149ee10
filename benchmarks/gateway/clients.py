"""The clients of the benchmark in one process: reads all streams as cheaply as it can, and notes when."""

import asyncio
import bisect
import json
import re
import sys
import time
from pathlib import Path
from typing import cast

import numpy as np
import uvloop

from benchmarks.gateway.workload import (
    NUM_STREAMS,
    NUM_TOKENS,
    PROMPT_CHARACTERS,
    PROMPT_EVERY_S,
    PROMPTED,
    RECEIVED,
    text_ends,
    tokens_of,
    words,
)
from shared.text import TextTokenizer

DEADLINE_S = 120.0
Times = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Taken = list[tuple[float, float]]
TEXT = re.compile(rb'"text": ?"([^"]*)"')


def request(host: str, port: int, **fields: object) -> bytes:
    body = json.dumps({"model": "model", "temperature": 0, **fields}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Stream(asyncio.Protocol):
    """One stream: notes when each of its tokens comes."""

    def __init__(self, body: bytes, ends: list[int], received: Times) -> None:
        self._body = body
        self._ends = ends
        self._received = received
        self._rest = b""
        self._num_characters = self._num_tokens = 0
        self.begun = asyncio.Event()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self, host: str, port: int) -> None:
        await asyncio.get_running_loop().create_connection(lambda: self, host, port)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.WriteTransport, transport).write(self._body)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        now_s = time.monotonic()
        events, _, self._rest = (self._rest + data).rpartition(b"\n\n")
        self._num_characters += sum(map(len, TEXT.findall(events)))
        known = bisect.bisect_right(self._ends, self._num_characters)
        self._received[self._num_tokens : known] = now_s
        self._num_tokens = known
        if known:
            self.begun.set()
        if b"data: [DONE]" in events:
            assert self._num_characters == self._ends[-1], f"{self._num_characters} of {self._ends[-1]}"
            self.ended.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(ConnectionError(f"ended after {self._num_tokens} tokens"))


async def prompt(host: str, port: int, text: str) -> tuple[float, float]:
    """Ask with a long prompt. Returns when it was sent and when it was answered (monotonic seconds)."""
    reader, writer = await asyncio.open_connection(host, port)
    sent_s = time.monotonic()
    writer.write(request(host, port, prompt=text, max_tokens=1))
    status = await reader.readline()
    assert b" 200 " in status, status
    writer.close()
    return sent_s, time.monotonic()


async def prompts(host: str, port: int, most: int, streams_end: asyncio.Future[None]) -> Taken:
    """Ask with a long prompt time and again, of other text each time, while the streams go on."""
    taken: Taken = []
    while len(taken) < most and not streams_end.done():
        number = len(taken)
        text = f"{number} the quick brown fox jumps over it, " * (PROMPT_CHARACTERS // 30)
        taken.append(await prompt(host, port, text[:PROMPT_CHARACTERS]))
        await asyncio.sleep(PROMPT_EVERY_S)
    return taken


async def main(host: str, port: int, model: Path, folder: Path, num_prompts: int) -> None:
    known, tokenizer = words(model), TextTokenizer.load(model)
    received = np.zeros((NUM_STREAMS, NUM_TOKENS))
    streams = []
    for number in range(NUM_STREAMS):
        body = request(host, port, prompt=[known[number]], max_tokens=NUM_TOKENS, stream=True)
        ends = text_ends(tokens_of(number, known), tokenizer)
        streams.append(Stream(body, ends, received[number]))
        await streams[-1].start(host, port)
    async with asyncio.timeout(DEADLINE_S):
        await streams[0].begun.wait()
        taken = await prompts(host, port, num_prompts, streams[0].ended)
        await asyncio.gather(*(stream.ended for stream in streams))
    np.save(folder / RECEIVED, received)
    np.save(folder / PROMPTED, np.array(taken))


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5])))
