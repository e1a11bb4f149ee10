"""The view of a person while a demo runs, and the table at its end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lemix.summary import Percentiles, Summary


class DemoView:
    """Progress bars, one for each thing that goes on. A context manager."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=console)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        """Print one line above the bars."""
        self._progress.console.print(line, markup=False, highlight=False)

    @contextmanager
    def task(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar; call what it yields with how many more of `total` are done."""
        task = self._progress.add_task(what, total=total)
        yield lambda more: self._progress.advance(task, more)


def summary_table(summary: Summary) -> Table:
    """The whole summary, one line each."""
    table = Table("measure", "value", title="LeMix demo", title_justify="left")
    for measure, value in _rows(summary):
        table.add_row(measure, value)
    return table


def _rows(summary: Summary) -> list[tuple[str, str]]:
    requests, training, loss = summary.requests, summary.training, summary.served_loss
    version = summary.weights_version
    return [
        (
            "requests",
            f"{requests.sent} sent ({requests.chat} by chat), {requests.completed} completed, "
            f"{requests.failed} failed",
        ),
        ("time to first token", _milliseconds(summary.ttft_s)),
        ("time between tokens", _milliseconds(summary.tbt_s)),
        ("completion tokens", f"{summary.completion_tokens_per_s:.1f} /s"),
        ("training batches", f"{training.batches_applied} applied of {training.batches_published} published"),
        ("training tokens", f"{training.tokens_per_s:.0f} /s in {training.optimizer_steps} optimizer steps"),
        ("served loss, held-out text", f"{loss.before:.3f} before, {loss.after:.3f} after (nats per token)"),
        ("weights version", f"{version.first} at first, {version.last} at last"),
        ("wall time", f"{summary.wall_s:.1f} s"),
    ]


def _milliseconds(seconds: Percentiles) -> str:
    if seconds.p50 is None or seconds.p99 is None:
        return "not measured"
    return f"p50 {seconds.p50 * 1e3:.0f} ms, p99 {seconds.p99 * 1e3:.0f} ms"
