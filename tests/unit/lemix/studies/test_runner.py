"""Resuming, failing and restricting, with runs that are made up, in this process."""

import contextlib
import json
import signal
from pathlib import Path

import pytest

from lemix.studies.command import chosen_cells
from lemix.studies.grid import Cell, Study
from lemix.studies.provenance import made_by
from lemix.studies.rows import Labels, Metrics
from lemix.studies.runner import (
    RunLog,
    StudyFailedError,
    complete,
    finished_runs,
    process_pool,
    run_within,
)
from shared.errors import ConfigurationError
from tests.unit.lemix.studies.support import (
    HereAndNow,
    cell_of,
    failing_on_random,
    killed_on_random,
    made_up,
    study_of,
)


def run(study: Study, log: RunLog) -> tuple[list[tuple[Labels, Metrics]], list[tuple[int, int]]]:
    heard: list[tuple[int, int]] = []
    complete(
        study,
        study.cells,
        log,
        pool=HereAndNow(),
        on_progress=lambda done, total: heard.append((done, total)),
    )
    return finished_runs(study, log), heard


def test_every_cell_is_run_and_logged_with_all_that_decides_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "made-up.jsonl"
    runs, heard = run(study_of([cell_of("lemix"), cell_of("lemix", seed=7, rate=8.0)]), RunLog(path))
    assert [metrics["seed_seen"] for _, metrics in runs] == [0.0, 7.0]
    assert [labels["rate"] for labels, _ in runs] == [4.0, 8.0]
    assert heard == [(0, 2), (1, 2), (2, 2)]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["options"]["cluster"]["seed"] for row in rows} == {0, 7}
    assert all(row["labels"]["policy"] == "lemix" and row["metrics"]["absent"] is None for row in rows)


def test_a_rerun_makes_only_the_runs_that_are_not_there(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "made-up.jsonl")
    run(study_of([cell_of("lemix")]), log)
    runs, heard = run(study_of([cell_of("lemix"), cell_of("lemix", seed=1)]), log)
    assert heard == [(1, 2), (2, 2)]
    assert [metrics["seed_seen"] for _, metrics in runs] == [0.0, 1.0]
    assert len((tmp_path / "made-up.jsonl").read_text().splitlines()) == 2


def test_other_options_are_another_run_though_labels_are_equal(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "made-up.jsonl")
    run(study_of([cell_of("lemix", seed=0)]), log)
    (only,), _ = run(study_of([cell_of("lemix", seed=1)]), log)
    assert only[1]["seed_seen"] == 1.0


def test_cells_of_equal_options_are_one_run_under_both_labels(tmp_path: Path) -> None:
    path = tmp_path / "made-up.jsonl"
    twins = [cell_of("lemix", twin=1), cell_of("lemix", twin=2)]
    runs, heard = run(study_of(twins), RunLog(path))
    assert [labels["twin"] for labels, _ in runs] == [1, 2]
    assert heard[-1] == (1, 1)
    assert len(path.read_text().splitlines()) == 1


def test_a_line_cut_off_by_a_kill_is_run_again(tmp_path: Path) -> None:
    path = tmp_path / "made-up.jsonl"
    study = study_of([cell_of("lemix"), cell_of("lemix", seed=1)])
    run(study, RunLog(path))
    path.write_text(path.read_text()[:-20])
    runs, heard = run(study, RunLog(path))
    assert heard == [(1, 2), (2, 2)]
    assert len(runs) == len(RunLog(path).finished()) == 2


def test_what_is_forgotten_is_run_again_and_nothing_else(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "made-up.jsonl")
    log.forget([cell_of("lemix")])
    study = study_of([cell_of("lemix"), cell_of("random")])
    run(study, log)
    log.forget([cell_of("lemix")])
    assert finished_runs(study, log) == [(cell_of("random").labels, made_up(cell_of("random")))]
    _, heard = run(study, log)
    assert heard == [(1, 2), (2, 2)]


def test_each_run_keeps_the_code_that_made_it(tmp_path: Path) -> None:
    path, cells = tmp_path / "made-up.jsonl", [cell_of("lemix"), cell_of("random"), cell_of("bound")]
    run(study_of(cells[:1]), RunLog(path, "a1b2"))
    run(study_of(cells[1:]), RunLog(path, "c3d4"))
    assert RunLog(path).commits(cells) == {"a1b2": 1, "c3d4": 2}
    assert RunLog(path).commits(cells[:2]) == {"a1b2": 1, "c3d4": 1}
    assert made_by({"a1b2": 1, "": 2}).startswith("Code: a1b2 (1 runs), unknown code (2 runs). Written on 20")


def test_a_failed_run_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "made-up.jsonl")
    study = study_of([cell_of("random"), cell_of("lemix")], run=failing_on_random)
    with pytest.raises(StudyFailedError, match=r"1 of 2 runs.*\n.*'policy': 'random'.*seed 0: .*no luck"):
        run(study, log)
    assert list(log.finished()) == [cell_of("lemix").key()]


def test_a_killed_process_ends_the_study_clearly_and_its_runs_are_kept(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "made-up.jsonl")
    cells = [cell_of("lemix"), cell_of("random"), cell_of("lemix", seed=1), cell_of("lemix", seed=2)]
    study = study_of(cells, run=killed_on_random)
    with pytest.raises(StudyFailedError, match=r"made-up was killed.*; 1 of 4 runs are kept: start it again"):
        complete(study, cells, log, pool=process_pool(study, 1), on_progress=lambda done, total: None)
    assert list(log.finished()) == [cells[0].key()]
    _, heard = run(study_of(cells), log)
    assert heard[0] == (1, 4) and heard[-1] == (4, 4)


def test_a_run_that_takes_too_long_has_failed_whatever_it_catches() -> None:
    def stuck(cell: Cell) -> Metrics:
        with contextlib.suppress(Exception):
            signal.raise_signal(signal.SIGALRM)
        return {}

    with pytest.raises(StudyFailedError, match="not over after 900 s"):
        run_within(stuck, cell_of("lemix"))
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_policies_restrict_the_cells_but_bounds_stay() -> None:
    study = study_of([cell_of("lemix"), cell_of("random"), cell_of("bound")])
    assert [cell.policy for cell in chosen_cells(study, ("lemix",))] == ["lemix", "bound"]
    assert len(chosen_cells(study, ())) == 3
    with pytest.raises(ConfigurationError, match="policy='best' is not in study made-up: lemix, random"):
        chosen_cells(study, ("best",))
