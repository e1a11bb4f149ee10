"""What the studies consist of, against the paper's grid and the issue."""

from collections import Counter

import pytest

from lemix.studies.catalogue import STUDIES, study_named
from lemix.studies.main_grid import paper_rows
from lemix.studies.rows import Row
from services.scheduler.policies import policy_named
from shared.errors import ConfigurationError
from shared.profiles.profile import profile_named

NAMES = {
    *("main", "heterogeneity", "ablation", "sensitivity"),
    *("synchronous", "generation", "data-parallel", "learning", "live"),
    *("overload", "unlike", "failures", "busy-parts"),
}
SEARCHING = {"frontier"}
"""They choose their runs as they go."""


def test_every_study_of_the_issue_is_there() -> None:
    assert set(STUDIES) == NAMES | SEARCHING
    with pytest.raises(ConfigurationError, match="study 'best' is unknown; choose one of: frontier, "):
        study_named("best", quick=True)


@pytest.mark.parametrize("name", sorted(NAMES | SEARCHING))
def test_every_policy_and_profile_of_a_study_exists(name: str) -> None:
    study = study_named(name, quick=False)
    cells = [*study.cells, *(cell for search in study.searches for cell in next(search.begin()))]
    for text in {cell.cluster.policy for cell in cells} - {"bound"}:
        policy_named(text, lambda: 0.0, None)
    for profile, stages in {(cell.cluster.profile, cell.cluster.stages) for cell in cells}:
        profile_named(profile, stages)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_study_has_no_setting_twice_and_its_quick_form_is_small(name: str) -> None:
    full, quick = (study_named(name, quick=quick).cells for quick in (False, True))
    settings = Counter((tuple(cell.labels.items()), cell.cluster.seed) for cell in full)
    assert max(settings.values()) == 1
    assert len(quick) <= 12 < len(full)
    assert max(cell.workload.num_tasks for cell in quick) <= 60


@pytest.mark.parametrize("name", sorted(SEARCHING))
def test_a_searching_study_asks_each_policy_the_same_and_is_small_when_quick(name: str) -> None:
    full, quick = (study_named(name, quick=quick) for quick in (False, True))
    asked = Counter(search.policy for search in full.searches)
    policies = ("lemix", "least_loaded", "round_robin", "separate")
    assert len({asked[policy] for policy in policies}) == 1
    firsts = [cell for search in quick.searches for cell in next(search.begin())]
    assert max(cell.workload.num_tasks for cell in firsts) <= 80


def test_the_main_grid_is_the_papers_and_goes_beyond_it() -> None:
    cells = study_named("main", quick=False).cells

    def seen(label: str) -> set[object]:
        return {cell.labels[label] for cell in cells}

    assert seen("rate") == {4, 8, 12, 16, 20, 24, 28, 32, 128}
    assert seen("training_rate") == {0.1, 0.3, 0.5, 0.7, 0.9}
    assert len(seen("class")) == 6
    assert {cell.cluster.seed for cell in cells} == set(range(5))
    assert {cell.cluster.nodes for cell in cells} == {4}
    assert {(cell.cluster.profile.partition("-")[0], cell.workload.batch_size) for cell in cells} == {
        ("gpt2", 3),
        ("llama2", 1),
    }


def test_separate_as_in_the_paper_splits_by_the_training_rate() -> None:
    splits = {
        (cell.labels["training_rate"], cell.cluster.policy)
        for cell in study_named("main", quick=False).cells
        if cell.policy == "separate:split=training_rate"
    }
    assert splits == {
        (rate, f"separate:split={split}")
        for rate, split in ((0.1, 0.25), (0.3, 0.25), (0.5, 0.5), (0.7, 0.75), (0.9, 0.75))
    }


def test_all_policies_of_a_point_get_the_same_workload_and_the_same_stages() -> None:
    cells = study_named("main", quick=True).cells
    assert len({repr((cell.workload, cell.cluster.seed)) for cell in cells}) == 1
    assert {cell.cluster.discipline for cell in cells} == {"slo_first"}


def test_the_papers_numbers_stand_at_the_points_that_were_run() -> None:
    def at(rate: int, training_rate: float) -> Row:
        labels = {
            "class": "gpt2-large",
            "rate": rate,
            "training_rate": training_rate,
            "policy": "lemix",
        }
        return Row(labels, {}, 1)

    rows = paper_rows("S-PP", [at(32, 0.5), at(16, 0.9)])
    lemix = {row.labels["rate"]: row for row in rows if row.labels["policy"] == "paper: lemix"}
    assert lemix[32].median("tasks_per_node_s") == 6.77
    assert lemix[32].median("slo_attainment") == pytest.approx(0.36)
    assert lemix[16].median("slo_attainment") == pytest.approx(0.74)
    assert {row.labels["class"] for row in rows} == {"gpt2-large"}
    assert paper_rows("", [at(32, 0.5)]) == []
