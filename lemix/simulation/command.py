"""`lemix simulate`: one run, its table, its files."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from lemix.printing import print_table, say
from lemix.simulation.cluster import SimulationOptions
from lemix.simulation.report import metrics_table, write_run
from lemix.simulation.run import simulate
from lemix.simulation.workload import WorkloadOptions
from shared.errors import ConfigurationError
from shared.profiles.profile import profile_named


def run_simulate(
    options: SimulationOptions,
    workload: WorkloadOptions,
    *,
    folder: Path,
    window: tuple[float, float] | None,
    console: Console,
) -> None:
    """Run, show, and write under `folder`. Raises ConfigurationError naming the option that is wrong."""
    if workload.trace:  # recorded requests are cut only to what the model reads
        context_length = profile_named(options.profile, options.stages).context_length
        workload = replace(workload, max_length=context_length)
    record, metrics = simulate(options, workload)
    print_table(console, metrics_table(metrics))
    try:
        write_run(folder, options=options, workload=workload, record=record, metrics=metrics, window=window)
    except OSError as error:
        raise ConfigurationError(f"output {str(folder)!r}: {error.strerror}") from error
    say(console, f"written to {folder}")
