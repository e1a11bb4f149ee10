"""A run's results: a table for people, and files: run.json, events.jsonl, timeline.png."""

import json
import platform
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python
from rich.table import Table

from lemix.simulation.cluster import SimulationOptions
from lemix.simulation.metrics import RunMetrics
from lemix.simulation.record import RunRecord, event_lines
from lemix.simulation.timeline_figure import draw_timeline
from lemix.simulation.workload import WorkloadOptions

PACKAGES = ("lemix", "numpy", "pydantic")
"""Whose versions are noted."""


def metrics_table(metrics: RunMetrics) -> Table:
    """One number or one group of numbers a row."""
    table = Table(title="Simulated run", title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in _rows(metrics):
        table.add_row(name, value)
    return table


def _rows(metrics: RunMetrics) -> Iterator[tuple[str, str]]:
    failed = f", {metrics.num_failed} failed" if metrics.num_failed else ""
    yield "requests", f"{metrics.num_answered} of {metrics.num_requests} answered{failed}"
    yield "training batches applied", f"{_percent(metrics.batches_applied_share)} of {metrics.num_batches}"
    yield "SLO attainment", f"{_percent(metrics.slo_attainment)} within {_ms(metrics.slo_s)}"
    yield "goodput (requests within SLO)", f"{_number(metrics.goodput_per_s)} /s"
    yield "TTFT mean, p50, p99", _ms(metrics.ttft_mean_s, metrics.ttft_p50_s, metrics.ttft_p99_s)
    yield "TBT mean, p50, p99", _ms(metrics.tbt_mean_s, metrics.tbt_p50_s, metrics.tbt_p99_s)
    yield "response mean, p99", _ms(metrics.response_mean_s, metrics.response_p99_s)
    yield "training tokens", f"{_number(metrics.training_tokens_per_s)} /s"
    yield "tasks per node-second", _number(metrics.tasks_per_node_s)
    yield "nodes used", str(metrics.nodes_used)
    yield "end to end", f"{metrics.end_to_end_s:.3f} s"
    by_stage = ", ".join(map(_percent, metrics.idle_share_by_stage))
    yield "idle share (by stage)", f"{_percent(metrics.idle_share)} ({by_stage})"
    yield "bubble rate", _percent(metrics.bubble_rate)
    yield (
        "forecast error: forward, response",
        f"{_percent(metrics.forward_error)}, {_percent(metrics.response_error)}",
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _ms(*seconds: float | None) -> str:
    return ", ".join("-" if value_s is None else f"{1000 * value_s:.1f}" for value_s in seconds) + " ms"


def write_run(
    folder: Path,
    *,
    options: SimulationOptions,
    workload: WorkloadOptions,
    record: RunRecord,
    metrics: RunMetrics,
    window: tuple[float, float] | None = None,
) -> None:
    """Write the run's files; `window` (seconds) is what the picture shows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(_summary(options, workload, metrics), indent=2) + "\n")
    with (folder / "events.jsonl").open("w") as file:
        file.writelines(event_lines(record))
    draw_timeline(record, folder / "timeline.png", window=window)


def _summary(options: SimulationOptions, workload: WorkloadOptions, metrics: RunMetrics) -> dict[str, Any]:
    """The seed is one of the options."""
    return {
        "options": to_jsonable_python(asdict(options)),
        "workload": asdict(workload) | {"trace": len(workload.trace)},
        "metrics": asdict(metrics),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }
