"""Small studies whose runs are made up."""

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any

from lemix.simulation.cluster import SimulationOptions
from lemix.simulation.workload import WorkloadOptions
from lemix.studies.grid import Cell, Report, Study
from lemix.studies.rows import Label, Metrics, Row


class HereAndNow(Executor):
    """Runs what is submitted before it returns."""

    def submit(self, call: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(call(*args, **named))
        except Exception as error:  # noqa: BLE001  # an executor keeps whatever comes
            future.set_exception(error)
        return future


def cell_of(policy: str, *, seed: int = 0, rate: float = 4.0, **labels: Label) -> Cell:
    return Cell(
        labels={"rate": rate, **labels, "policy": policy},
        cluster=SimulationOptions(nodes=2, profile="gpt2-small@rtx6000ada", policy=policy, seed=seed),
        workload=WorkloadOptions(rate_per_s=rate, num_tasks=4),
    )


def made_up(cell: Cell) -> Metrics:
    """Rate and seed come back."""
    return {"rate_seen": cell.workload.rate_per_s, "seed_seen": float(cell.cluster.seed), "absent": None}


def failing_on_random(cell: Cell) -> Metrics:
    if cell.policy == "random":
        raise ValueError("no luck")
    return made_up(cell)


def killed_on_random(cell: Cell) -> Metrics:
    if cell.policy == "random":
        os.kill(os.getpid(), signal.SIGKILL)
    return made_up(cell)


def empty_report(rows: Sequence[Row]) -> Report:
    return Report()


def study_of(cells: Sequence[Cell], **changes: object) -> Study:
    parts: Mapping[str, object] = {
        "name": "made-up",
        "title": "Made up",
        "about": "Nothing runs.",
        "cells": cells,
        "run": made_up,
        "report": empty_report,
    }
    return Study(**{**parts, **changes})
