"""Searches driven side by side, with runs that are made up, in this process."""

from pathlib import Path

import pytest

from lemix.studies.exploring import Explorer
from lemix.studies.grid import Cell, Search, Study
from lemix.studies.runner import RunLog, StudyFailedError
from tests.unit.lemix.studies.support import HereAndNow, cell_of, failing_on_random, study_of


def up_to(policy: str, rate: float) -> Search:
    """Goes on until a run says that its rate is there."""
    seen, wanted = 0.0, 1.0
    while seen < rate:
        (metrics,) = yield [cell_of(policy, rate=wanted)]
        seen = metrics["rate_seen"] or 0.0
        wanted = seen + 1
    return seen


def explored(study: Study, searches: list[Search], log: RunLog) -> tuple[list[Cell], list[int]]:
    heard: list[int] = []
    return Explorer(study, searches, log, pool=HereAndNow(), on_run=heard.append).explore(), heard


def test_each_search_is_told_what_its_run_showed_and_all_runs_are_kept(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "made-up.jsonl")
    cells, heard = explored(study_of([]), [up_to("lemix", 3), up_to("random", 2)], log)
    assert [(cell.policy, cell.workload.rate_per_s) for cell in cells] == [
        *(("lemix", 1.0), ("lemix", 2.0), ("lemix", 3.0)),
        *(("random", 1.0), ("random", 2.0)),
    ]
    assert heard == [1, 2, 3, 4, 5]
    again, heard = explored(study_of([]), [up_to("lemix", 4)], log)
    assert (len(again), heard) == (4, [1]), "only the run that was not there"


def test_runs_that_are_wanted_together_are_told_together_in_their_order(tmp_path: Path) -> None:
    def both() -> Search:
        told = yield [cell_of("lemix", seed=2), cell_of("lemix", seed=1)]
        return [metrics["seed_seen"] for metrics in told]

    log = RunLog(tmp_path / "made-up.jsonl")
    for _ in range(2):
        explorer = Explorer(
            study_of([]), [both(), up_to("lemix", 2)], log, pool=HereAndNow(), on_run=lambda made: None
        )
        explorer.explore()
        assert explorer.found == [[2.0, 1.0], 2.0]


def test_a_failed_run_ends_its_search_alone_and_is_named(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "made-up.jsonl")
    study = study_of([], run=failing_on_random)
    with pytest.raises(StudyFailedError, match=r"1 runs of made-up failed:\n.*'policy': 'random'.*no luck"):
        explored(study, [up_to("random", 3), up_to("lemix", 3)], log)
    assert len(log.finished()) == 3
