"""One benchmark on a card: `python -m benchmarks.gpu.step NAME FOLDER DEVICE` writes FOLDER/NAME.json."""

import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.gpu import hand_over, serving, training, two_stages
from benchmarks.report import setting, write

BENCHMARKS: dict[str, Callable[[Path, str], AsyncIterator[dict[str, Any]]]] = {
    "hand_over": hand_over.main,
    "serving": serving.main,
    "training": training.main,
    "two_stages": two_stages.main,
}


async def run(name: str, folder: Path, device: str) -> None:
    """Write the result again after each measurement: time may run out before the next one."""
    before = setting(device)
    async for result in BENCHMARKS[name](folder, device):
        print(write(name, before, result, folder).read_text(), flush=True)


if __name__ == "__main__":
    chosen, folder_name, device_name = sys.argv[1:]
    uvloop.run(run(chosen, Path(folder_name), device_name))
