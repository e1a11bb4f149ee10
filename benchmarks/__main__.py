"""Run the benchmarks named on the command line, or all."""

import sys
from pathlib import Path

import uvloop

from benchmarks import (
    deciding,
    decode,
    delayed_gradients,
    hop,
    merge,
    profile_error,
    publish,
    report,
    schedules,
    simulation,
    startup,
    training,
)

BENCHMARKS = {
    "hop": hop.main,
    "decode": decode.main,
    "training": training.main,
    "publish": publish.main,
    "startup": startup.main,
    "deciding": deciding.main,
    "profile_error": profile_error.main,
    "merge": merge.main,
    "simulation": simulation.main,
    "schedules": schedules.main,
    "delayed_gradients": delayed_gradients.main,
}
WORK = Path("runs/bench")
RESULTS = Path("docs/benchmarks")


def main(names: list[str]) -> None:
    for name in names or BENCHMARKS:
        before = report.setting()
        result = uvloop.run(BENCHMARKS[name](WORK))
        path = report.write(name, before, result, RESULTS)
        print(path.read_text())


if __name__ == "__main__":
    main(sys.argv[1:])
