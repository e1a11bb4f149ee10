"""One benchmark on a card: `python -m benchmarks.gpu.step NAME FOLDER DEVICE` writes FOLDER/NAME.json."""

import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.gpu import decode, hand_over, prefill, training
from benchmarks.report import setting, write

BENCHMARKS: dict[str, Callable[[Path, str], Coroutine[Any, Any, dict[str, Any]]]] = {
    "decode": decode.main,
    "hand_over": hand_over.main,
    "prefill": prefill.main,
    "training": training.main,
}


def main(name: str, folder: str, device: str) -> None:
    before = setting(device)
    result = uvloop.run(BENCHMARKS[name](Path(folder), device))
    print(write(name, before, result, Path(folder)).read_text())


if __name__ == "__main__":
    main(*sys.argv[1:])
