"""`lemix simulate`: one run, its table, its files."""

from pathlib import Path

from rich.console import Console

from lemix.simulation.cluster import SimulationOptions
from lemix.simulation.report import metrics_table, write_run
from lemix.simulation.run import simulate
from lemix.simulation.workload import WorkloadOptions


def run_simulate(
    options: SimulationOptions,
    workload: WorkloadOptions,
    *,
    folder: Path,
    window: tuple[float, float] | None,
    console: Console,
) -> None:
    """Run, show, and write under `folder`. Raises ConfigurationError naming the option that is wrong."""
    record, metrics = simulate(options, workload)
    console.print(metrics_table(metrics))
    write_run(folder, options=options, workload=workload, record=record, metrics=metrics, window=window)
    console.print(f"written to {folder}", markup=False, highlight=False, soft_wrap=True)
