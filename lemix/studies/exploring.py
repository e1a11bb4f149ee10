"""Driving searches side by side: as many runs at a time as the pool takes."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait

from lemix.studies.grid import Cell, Search, Study
from lemix.studies.rows import Metrics
from lemix.studies.runner import FAILURES_SHOWN, RUN_DEADLINE_S, Ended, RunLog, StudyFailedError, run_within


class Explorer:
    """Runs the searches of a study to their ends. A run that the log has is not made again."""

    def __init__(
        self,
        study: Study,
        searches: Sequence[Search],
        log: RunLog,
        *,
        pool: Executor,
        on_run: Callable[[int], None],
    ) -> None:
        """`on_run` hears how many runs have been made."""
        self._study = study
        self._searches = searches
        self._log = log
        self._pool = pool
        self._on_run = on_run
        self._known = dict(log.finished())
        self._visited: list[dict[str, Cell]] = [{} for _ in searches]
        """By search: the runs it wanted."""
        self._wanted: list[Sequence[Cell]] = [[] for _ in searches]
        """By search: those that it waits for."""
        self._running: dict[Future[tuple[Metrics, float]], tuple[int, Cell]] = {}
        self._failures: list[str] = []
        self._num_made = 0
        self.found: list[object] = [None for _ in searches]
        """By search: the value that it returned."""

    def explore(self) -> list[Cell]:
        """All runs that the searches wanted, in the order of the searches. The pool is shut down.

        Raises StudyFailedError naming the runs that failed; their searches end, the others go on.
        """
        try:
            for place in range(len(self._searches)):
                self._go_on(place, None)
            while self._running:
                self._take(wait(self._running, timeout=2 * RUN_DEADLINE_S, return_when=FIRST_COMPLETED).done)
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)
        if self._failures:
            some = "".join(f"\n  {failure}" for failure in self._failures[:FAILURES_SHOWN])
            raise StudyFailedError(f"{len(self._failures)} runs of {self._study.name} failed:{some}")
        return [cell for visited in self._visited for cell in visited.values()]

    def _go_on(self, place: int, metrics: Sequence[Metrics] | None) -> None:
        """Tell a search what came out; start the next runs that it wants and nobody has made."""
        search = self._searches[place]
        try:
            cells = next(search) if metrics is None else search.send(metrics)
            while (told := self._all_known(cells)) is not None:
                self._visited[place] |= {cell.key(): cell for cell in cells}
                cells = search.send(told)
        except StopIteration as end:
            self.found[place] = end.value
            return
        self._visited[place] |= {cell.key(): cell for cell in cells}
        self._wanted[place] = cells
        for cell in cells:
            if cell.key() not in self._known:
                self._running[self._pool.submit(run_within, self._study.run, cell)] = place, cell

    def _all_known(self, cells: Sequence[Cell]) -> list[Metrics] | None:
        found = [self._known.get(cell.key()) for cell in cells]
        known = [metrics for metrics in found if metrics is not None]
        return known if len(known) == len(cells) else None

    def _take(self, done: "set[Future[tuple[Metrics, float]]]") -> None:
        if not done:
            raise StudyFailedError(f"no run of {self._study.name} was over after {2 * RUN_DEADLINE_S} s")
        for future in done:
            place, cell = self._running.pop(future)
            if (error := future.exception()) is not None:
                self._fail(cell, error)
                continue
            metrics, wall_s = future.result()
            self._log.add(Ended(cell, metrics, wall_s))
            self._known[cell.key()] = metrics
            self._num_made += 1
            self._on_run(self._num_made)
            told = self._all_known(self._wanted[place])
            if told is not None:
                self._go_on(place, told)

    def _fail(self, cell: Cell, error: BaseException) -> None:
        """Note the failure of a run. Raises StudyFailedError when no other can be made either."""
        if isinstance(error, BrokenExecutor):
            raise StudyFailedError(
                f"a process that made runs of {self._study.name} was killed; start it again to go on"
            ) from error
        self._failures.append(
            f"{dict(cell.labels)}, seed {cell.cluster.seed}: {type(error).__name__}: {error}"
        )
