"""Which checkpoints are kept: the newest, a way back by time, what serves, and version 0."""

import random
from pathlib import Path

import pytest

from services.trainer.checkpoints.retention import Retention
from shared.checkpoints import Checkpoint
from tests.unit.trainer.support import checkpoints_of, manifest

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
AGES_S = (HOUR_S, DAY_S)


def removed(found: list[Checkpoint], retention: Retention, now_wall_s: float = 0.0) -> tuple[int, ...]:
    return tuple(each.manifest.version for each in retention.dispensable(found, now_wall_s=now_wall_s))


@pytest.mark.parametrize(
    ("all_of_them", "withheld", "undecided", "expected"),
    [
        ((5, 4, 3), (), (), (3,)),
        ((5, 4, 3), (5,), (), (3,)),
        ((5, 4, 3), (5, 4), (), ()),
        ((5, 4, 3, 2), (5, 4), (), (2,)),
        ((5, 4, 3, 2), (5, 4, 3, 2), (), (3, 2)),
        ((5, 4, 3, 2), (5, 4, 3), (3,), ()),
        ((5, 4, 3, 0), (), (), (3,)),
        ((5,), (5,), (), ()),
    ],
)
def test_the_newest_checkpoints_are_kept_and_those_that_may_serve_or_may_yet_and_version_0(
    all_of_them: tuple[int, ...],
    withheld: tuple[int, ...],
    undecided: tuple[int, ...],
    expected: tuple[int, ...],
) -> None:
    found = checkpoints_of(*all_of_them, withheld=withheld)
    old = Retention(newest=2).dispensable(found, now_wall_s=0.0, undecided=undecided)
    assert tuple(each.manifest.version for each in old) == expected


def saved_at(**times_s: float) -> list[Checkpoint]:
    """Newest first: `v3=20.0` is version 3, saved at 20 s."""
    each = [(int(name[1:]), time_s) for name, time_s in times_s.items()]
    return [
        Checkpoint(manifest(version, created_wall_s=time_s), Path(str(version)))
        for version, time_s in sorted(each, reverse=True)
    ]


def test_after_many_batches_in_a_short_time_there_is_a_version_from_before_them() -> None:
    """100 batches in 20 s, one checkpoint for 16 of them; the last training before was 2 hours ago."""
    found = saved_at(v10=0.0, v26=7203.0, v42=7206.0, v58=7209.0, v74=7212.0, v90=7215.0, v106=7218.0)
    kept_s = Retention(newest=2, ages_s=AGES_S)
    assert removed(found, kept_s, now_wall_s=7220.0) == (74, 58, 42)
    assert removed(found, Retention(newest=2), now_wall_s=7220.0) == (74, 58, 42, 26, 10)


@pytest.mark.parametrize("age_s", AGES_S)
def test_the_one_that_is_old_enough_gives_way_to_the_next(age_s: float) -> None:
    retention = Retention(newest=1, ages_s=(age_s,))
    found = saved_at(v1=0.0, v2=0.5 * age_s, v3=0.6 * age_s, v4=1.1 * age_s)
    assert removed(found, retention, now_wall_s=1.2 * age_s) == (3,)
    assert removed(found, retention, now_wall_s=1.55 * age_s) == (1,)


@pytest.mark.parametrize("every_s", [20.0, 700.0, 5000.0])
def test_however_long_a_run_trains_it_can_go_back_an_hour_and_a_day_and_keeps_few(every_s: float) -> None:
    """Three days of checkpoints, of which each time the dispensable ones are removed."""
    retention, kept = Retention(newest=2, ages_s=AGES_S), saved_at()
    draw = random.Random(5)
    now_s, version = 0.0, 0
    while now_s < 3 * DAY_S:
        now_s, version = now_s + every_s * draw.uniform(0.5, 1.5), version + 1
        kept = [Checkpoint(manifest(version, created_wall_s=now_s), Path(str(version))), *kept]
        gone = retention.dispensable(kept, now_wall_s=now_s)
        kept = [each for each in kept if each not in gone]
        assert len(kept) <= 2 + 2 * len(AGES_S)
        ages_s = [now_s - each.manifest.created_wall_s for each in kept]
        for age_s in AGES_S:
            if now_s > 2 * age_s + 2 * every_s:
                assert any(age_s <= age <= 2 * age_s + 2 * every_s for age in ages_s), (age_s, ages_s)
