"""A node of two stages that share the card; one of one stage is in `serving`."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.node import node_under_test

STREAMS = (1, 8)


async def main(work: Path, device: str) -> AsyncIterator[dict[str, Any]]:
    """Yields all that is known after each measurement."""
    serving = work / "serving.json"
    of_one = json.loads(serving.read_text())["result"] if serving.exists() else {}
    result: dict[str, Any] = {}
    async with node_under_test("two-stages", work, device, stages=2) as node:
        for count in STREAMS:
            name = f"decode_{count}"
            result[name] = await node.decode(count)
            if name in of_one:
                result[name]["to_one_stage"] = result[name]["tokens_per_s"] / of_one[name]["tokens_per_s"]
            yield result
