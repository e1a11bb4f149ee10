"""Runs the clusters that clients ask, in a process of their own: `python -m tests.clients.clusters DIR`.

Clients may block then, or take seconds of processor time, and no stage seems silent. The process writes where
its gateways answer, as JSON, and ends when its standard input does.
"""

import asyncio
import json
import sys
from pathlib import Path

from shared.settings import EMBEDDED_MODEL
from tests.clients.weather import script
from tests.support.chat_templates import QWEN
from tests.support.whole_cluster import scripted_cluster, whole_cluster


async def run(folder: Path) -> None:
    """Serve until nobody listens any more."""
    template = folder / "qwen.jinja"
    template.write_text(QWEN)
    run_dirs = [folder / name for name in ("real", "weather")]
    for run_dir in run_dirs:
        run_dir.mkdir()
    async with (
        whole_cluster(Path(EMBEDDED_MODEL), run_dirs[0], num_stages=2) as real,
        scripted_cluster(script, run_dirs[1], chat_template=str(template)) as weather,
    ):
        sys.stdout.write(json.dumps({"real": real, "weather": weather}) + "\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1])))
