"""`lemix study`: make a study's runs, those that are not there yet, and write what they say."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lemix.printing import say
from lemix.studies.catalogue import study_named
from lemix.studies.grid import Cell, Study
from lemix.studies.report import write
from lemix.studies.rows import BOUND, aggregate
from lemix.studies.runner import RunLog, complete, finished_runs, process_pool
from shared.errors import ConfigurationError

DOCUMENTS = Path("docs/studies")


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyOptions:
    """A person's choices for a study."""

    name: str
    quick: bool = False
    fresh: bool = False
    policies: tuple[str, ...] = ()
    """Make only the runs of these; empty: all. The report has all that were ever made."""
    workers: int | None = None
    """Runs at the same time; None: as many as there are cores."""
    output: Path | None = None
    """None: docs/studies, or under `runs_dir` for a quick one."""
    runs_dir: Path = Path("runs")

    @property
    def folder(self) -> Path:
        quick = self.runs_dir / "studies" / "quick"
        return self.output or (quick if self.quick else DOCUMENTS)

    @property
    def log(self) -> Path:
        return self.runs_dir / "studies" / f"{self.name}{'-quick' if self.quick else ''}.jsonl"

    @property
    def command(self) -> str:
        return " ".join(["lemix", "study", self.name, *(["--quick"] if self.quick else [])])


def run_study(options: StudyOptions, console: Console) -> Path:
    """Returns the Markdown file.

    Raises ConfigurationError for an unknown study or policy, StudyFailedError naming the runs that failed.
    """
    study = study_named(options.name, quick=options.quick)
    cells = chosen_cells(study, options.policies)
    log = RunLog(options.log)
    if options.fresh:
        log.forget(cells)
    with _progress(console) as progress:
        bar = progress.add_task(f"study {study.name}", total=None)
        complete(
            study,
            cells,
            log,
            pool=process_pool(study, options.workers),
            on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    rows = aggregate(finished_runs(study, log))
    path = write(study, rows, options.folder, command=options.command)
    say(console, f"written to {path}")
    return path


def chosen_cells(study: Study, policies: Sequence[str]) -> list[Cell]:
    """The cells of these policies, and the bounds. Raises ConfigurationError for a policy the study has
    not.
    """
    known = list(dict.fromkeys(cell.policy for cell in study.cells))
    for policy in policies:
        if policy not in known:
            raise ConfigurationError(f"policy={policy!r} is not in study {study.name}: {', '.join(known)}")
    return [cell for cell in study.cells if not policies or cell.policy in (*policies, BOUND)]


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
