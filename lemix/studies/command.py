"""`lemix study`: make a study's runs, those that are not there yet, and write what they say."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lemix.printing import say
from lemix.studies.catalogue import study_named
from lemix.studies.exploring import Explorer
from lemix.studies.grid import Cell, PolicySearch, Study
from lemix.studies.provenance import code_here, made_by
from lemix.studies.report import write
from lemix.studies.rows import BOUND, aggregate
from lemix.studies.runner import RunLog, complete, finished_runs, process_pool
from shared.errors import ConfigurationError

DOCUMENTS = Path("docs/studies")
OnProgress = Callable[[int, int | None], None]
"""Hears how many runs there are, of how many; None: nobody knows yet."""


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
    trace: Path | None = None
    """Recorded requests, for the study of them."""

    @property
    def folder(self) -> Path:
        quick = self.runs_dir / "studies" / "quick"
        return self.output or (quick if self.quick else DOCUMENTS)

    @property
    def log(self) -> Path:
        return self.runs_dir / "studies" / f"{self.name}{'-quick' if self.quick else ''}.jsonl"

    @property
    def command(self) -> str:
        trace = ["--trace", self.trace.name] if self.trace else []
        return " ".join(["lemix", "study", self.name, *trace, *(["--quick"] if self.quick else [])])


def run_study(options: StudyOptions, console: Console) -> Path:
    """Returns the Markdown file.

    Raises ConfigurationError for an unknown study or policy, StudyFailedError naming the runs that failed.
    """
    study = study_named(options.name, quick=options.quick, trace=options.trace)
    log = RunLog(options.log, code_here())
    with progress_of(console) as progress:
        bar = progress.add_task(f"study {study.name}", total=None)
        make = _search if study.searches else _make
        study = make(
            study,
            options,
            log,
            on_progress=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    rows = aggregate(finished_runs(study, log))
    path = write(study, rows, options.folder, command=options.command, made=made_by(log.commits(study.cells)))
    say(console, f"written to {path}")
    return path


def _make(study: Study, options: StudyOptions, log: RunLog, on_progress: OnProgress) -> Study:
    """Make the runs of a study that has them all in a list."""
    cells = chosen_cells(study, options.policies)
    if options.fresh:
        log.forget(cells)
    pool = process_pool(study, options.workers)
    complete(study, cells, log, pool=pool, on_progress=on_progress)
    return study


def _search(study: Study, options: StudyOptions, log: RunLog, on_progress: OnProgress) -> Study:
    """Make the runs that its searches want; returns it with them. The report has only those."""
    searches = chosen_searches(study, options.policies)
    if options.fresh:
        log.forget_policies({search.policy for search in searches})
    pool = process_pool(study, options.workers)
    explorer = Explorer(
        study,
        [search.begin() for search in searches],
        log,
        pool=pool,
        on_run=lambda done: on_progress(done, None),
    )
    return replace(study, cells=explorer.explore())


def chosen_searches(study: Study, policies: Sequence[str]) -> list[PolicySearch]:
    """The searches of these policies, and the bounds. Raises ConfigurationError for a policy the study has
    not.
    """
    _check_policies(study, policies, [search.policy for search in study.searches])
    return [search for search in study.searches if not policies or search.policy in (*policies, BOUND)]


def chosen_cells(study: Study, policies: Sequence[str]) -> list[Cell]:
    """The cells of these policies, and the bounds. Raises ConfigurationError for a policy the study has
    not.
    """
    _check_policies(study, policies, [cell.policy for cell in study.cells])
    return [cell for cell in study.cells if not policies or cell.policy in (*policies, BOUND)]


def _check_policies(study: Study, policies: Sequence[str], known: Sequence[str]) -> None:
    for policy in policies:
        if policy not in known:
            names = ", ".join(dict.fromkeys(known))
            raise ConfigurationError(f"policy={policy!r} is not in study {study.name}: {names}")


def progress_of(console: Console) -> Progress:
    """A line that counts runs."""
    return Progress(
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
