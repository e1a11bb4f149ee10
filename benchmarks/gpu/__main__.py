"""Run the steps in the order of their worth, each within its time; what each found is written at once.

    python -m benchmarks.gpu [FOLDER] [--device cuda:0] [--only STEP ...]

A step that fails or runs out of time does not stop the next one. The exit status says whether all passed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.report import setting

LIMIT_S = 360.0
"""The time for the whole: a card is lent for minutes."""


@dataclass(frozen=True, slots=True)
class Step:
    """A process of its own, so that a card that hangs takes no other step with it."""

    name: str
    limit_s: float
    arguments: tuple[str, ...]
    """Those of `python -m`."""


def steps(folder: Path, device: str) -> tuple[Step, ...]:
    """All of them, what is worth most first."""
    junit = f"--junit-xml={folder / 'tests.xml'}"
    # That machine's versions of packages may warn of other things: no reason to fail there.
    tests = ("-m", "gpu", "tests/gpu", "-v", "--durations=10", "--maxfail=5", "-W", "default", junit)

    def benchmark(name: str, limit_s: float) -> Step:
        return Step(name, limit_s, ("benchmarks.gpu.step", name, str(folder), device))

    return (
        Step("tests", 100.0, ("pytest", *tests)),
        benchmark("serving", 120.0),
        benchmark("training", 70.0),
        benchmark("two_stages", 45.0),
        benchmark("hand_over", 25.0),
    )


def limit_s(wanted: Sequence[Step], left_s: float) -> float:
    """Seconds for the first of them: all that is left but for the limits of the others."""
    return max(left_s - sum(step.limit_s for step in wanted[1:]), 1.0)


PASSED = "passed"


class Ending(NamedTuple):
    """How a step ended."""

    how: str
    took_s: float


def run(step: Step, folder: Path, limit_s: float) -> Ending:
    """Run a step; its output goes to a file beside its result."""
    start_s = time.monotonic()
    with (folder / f"{step.name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *step.arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            status = process.wait(limit_s)
            how = PASSED if status == 0 else f"failed with {status}"
        except subprocess.TimeoutExpired:
            how = f"stopped after {limit_s:.0f} s"
        finally:  # what it started goes with it
            _kill_group(process)
    return Ending(how, round(time.monotonic() - start_s, 1))


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def main() -> int:
    parser = ArgumentParser("python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps only")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here")
    folder = chosen.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [step for step in steps(folder, chosen.device) if not chosen.only or step.name in chosen.only]
    before = setting(chosen.device)
    endings: dict[str, Ending] = {}
    end_s = time.monotonic() + LIMIT_S
    for place, step in enumerate(wanted):
        endings[step.name] = run(step, folder, limit_s(wanted[place:], end_s - time.monotonic()))
        summary = {"setting": before, "steps": {name: ending._asdict() for name, ending in endings.items()}}
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(f"{step.name}: {endings[step.name].how}", flush=True)
    return 0 if all(ending.how == PASSED for ending in endings.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
