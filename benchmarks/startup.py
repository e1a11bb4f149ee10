"""From the command to the first completion."""

import time
from pathlib import Path
from typing import Any

from benchmarks.report import spread
from lemix.client import ApiClient, served_model
from lemix.launcher import LocalCluster
from lemix.run_folder import clear
from lemix.topology import ClusterOptions

NUM_ROUNDS = 3


async def start_once(work: Path) -> dict[str, float]:
    options = ClusterOptions(name="startup", runs_dir=work, nodes=2, stages=2)
    clear(options.run_dir)
    start_s = time.monotonic()
    async with LocalCluster(options) as cluster:
        async with ApiClient(cluster.api_url, model=await served_model(cluster.api_url)) as client:
            await client.complete("The open() function", max_tokens=8)
        answered_s = time.monotonic()
    return {"first_completion_s": answered_s - start_s, "stop_s": time.monotonic() - answered_s}


async def main(work: Path) -> dict[str, Any]:
    rounds = [await start_once(work) for _ in range(NUM_ROUNDS)]
    return {kind: spread([one[kind] for one in rounds]) for kind in rounds[0]}
