"""Run the benchmarks named on the command line, or all; on a GPU those that know how to."""

from argparse import ArgumentParser
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import (
    between_hosts,
    deciding,
    decode,
    decode_step,
    delayed_gradients,
    forecasts,
    giving_way,
    hop,
    layouts,
    learning,
    merge,
    merge_under_load,
    messages,
    overload,
    pacing,
    prefix_cache,
    profile_error,
    publish,
    report,
    schedules,
    simulation,
    soak,
    startup,
    structured_output,
    training,
)
from benchmarks.gateway import measure as gateway

ON_A_DEVICE = {"decode": decode.main, "training": training.main}
BENCHMARKS: dict[str, Callable[[Path], Coroutine[Any, Any, dict[str, Any]]]] = {
    **ON_A_DEVICE,
    "decode_step": decode_step.main,
    "giving_way": giving_way.main,
    "hop": hop.main,
    "layouts": layouts.main,
    "learning": learning.main,
    "between_hosts": between_hosts.main,
    "gateway": gateway.main,
    "messages": messages.main,
    "overload": overload.main,
    "pacing": pacing.main,
    "prefix_cache": prefix_cache.main,
    "publish": publish.main,
    "soak": soak.main,
    "startup": startup.main,
    "structured_output": structured_output.main,
    "deciding": deciding.main,
    "forecasts": forecasts.main,
    "profile_error": profile_error.main,
    "merge": merge.main,
    "merge_under_load": merge_under_load.main,
    "simulation": simulation.main,
    "schedules": schedules.main,
    "delayed_gradients": delayed_gradients.main,
}
NEEDS_A_MODEL = {"learning"}
"""Runs only where it is named."""
WORK = Path("runs/bench")
RESULTS = Path("docs/benchmarks")


def main() -> None:
    parser = ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--device", default="cpu", help=f"cuda:N, for {' and '.join(ON_A_DEVICE)}")
    chosen = parser.parse_args()
    is_cpu = chosen.device == "cpu"
    on_gpu = {name: partial(measure, device=chosen.device) for name, measure in ON_A_DEVICE.items()}
    measures = BENCHMARKS if is_cpu else on_gpu
    if unknown := [name for name in chosen.names if name not in measures]:
        parser.error(f"no benchmark {unknown[0]!r} on {chosen.device}; there are {', '.join(measures)}")
    for name in chosen.names or measures.keys() - NEEDS_A_MODEL:
        before = report.setting(chosen.device)
        result = uvloop.run(measures[name](WORK))
        path = report.write(name if is_cpu else f"{name}_cuda", before, result, RESULTS)
        print(path.read_text())


if __name__ == "__main__":
    main()
