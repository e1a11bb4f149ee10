"""A prompt that has been computed before: time to its first token, and the rows that eight choices cost.

Over HTTP through one node of one stage. Rows are those that the stage says it has run.
"""

import asyncio
import random
from pathlib import Path
from typing import Any

from benchmarks.models import SHAPES, model_folder
from benchmarks.report import spread
from lemix.client import ApiClient, served_model
from lemix.open_cluster import open_cluster
from lemix.run_folder import clear
from lemix.topology import ClusterOptions
from shared import subjects
from shared.bus.base import Incoming
from shared.bus.nats import NatsBus
from shared.messages.events import StageProgress

PROMPT_LENGTH, NUM_CHOICES = 512, 8
NUM_ROUNDS = {"small": 15, "big": 5}


class RowCount:
    """Rows of all iterations that stages have told of."""

    def __init__(self) -> None:
        self.num_rows = 0

    async def on_progress(self, incoming: Incoming[StageProgress]) -> None:
        self.num_rows += sum(each.op.num_tokens for each in incoming.message.ended)


async def ttft_s(client: ApiClient, prompt: list[int]) -> float:
    completion = await client.complete(prompt, max_tokens=2, temperature=0)
    return completion.ttft_s


async def rows_of(client: ApiClient, count: RowCount, prompt: list[int], num_choices: int) -> int:
    """Rows that the stage runs for a request. The gateway's own probes add one now and then."""
    before = count.num_rows
    await client.complete(prompt, max_tokens=1, temperature=1, n=num_choices)
    await asyncio.sleep(2 * subjects.PROGRESS_EVERY_S)
    return count.num_rows - before


async def measure(name: str, work: Path) -> dict[str, Any]:
    """Each round has a prompt of its own: first, again, and by eight choices of another one."""
    folder, rng = model_folder(name, work / "models"), random.Random(1)

    def new_prompt() -> list[int]:
        return [rng.randrange(SHAPES[name]["vocab_size"]) for _ in range(PROMPT_LENGTH)]

    options = ClusterOptions(name=f"prefix-{name}", runs_dir=work, nodes=1, stages=1, model=str(folder))
    clear(options.run_dir)
    first_s, again_s, rows, rows_of_choices = [], [], [], []
    async with (
        open_cluster(options) as cluster,
        ApiClient(cluster.api_url, model=await served_model(cluster.api_url)) as client,
    ):
        bus, count = await NatsBus.connect(cluster.nats_url, name="bench"), RowCount()
        await bus.subscribe(subjects.PROGRESS.at(), count.on_progress)
        await ttft_s(client, new_prompt())
        for _ in range(NUM_ROUNDS[name]):
            prompt = new_prompt()
            first_s.append(await ttft_s(client, prompt))
            again_s.append(await ttft_s(client, prompt))
            rows.append(await rows_of(client, count, new_prompt(), 1))
            rows_of_choices.append(await rows_of(client, count, new_prompt(), NUM_CHOICES))
        await bus.close()
    return {
        "first_ttft_s": spread(first_s),
        "again_ttft_s": spread(again_s),
        "again_to_first": spread([again / first for again, first in zip(again_s, first_s, strict=True)]),
        "rows_of_one_choice": spread(rows),
        "rows_of_eight_choices": spread(rows_of_choices),
    }


async def main(work: Path) -> dict[str, Any]:
    return {name: await measure(name, work) for name in NUM_ROUNDS}
