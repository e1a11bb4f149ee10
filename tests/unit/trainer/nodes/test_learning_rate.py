"""Learning rates against numbers worked out by hand."""

import pytest

from services.trainer.nodes.learning_rate import LearningRate, suitable_rate, suitable_warmup
from services.trainer.settings import TrainerSettings
from shared.errors import ConfigurationError
from shared.settings import read_settings


def test_it_rises_over_the_warm_up_and_stays() -> None:
    rate = LearningRate(peak=1.0, warmup_batches=4)
    assert [rate.at(number) for number in (0, 1, 3, 4, 1000)] == [0.25, 0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("num_weights", "is_adapter", "rate"),
    [
        (135_000_000, False, 7.5e-6),
        (135_000_000, True, 7.5e-5),
        (67_500_000, False, 1.5e-5),
        (7_000_000_000, False, 7.5e-6),
        (1_000_000, False, 1e-3),
        (1_000_000, True, 1e-3),
        (None, False, 1e-3),
    ],
)
def test_larger_models_learn_more_gently(num_weights: int | None, is_adapter: bool, rate: float) -> None:
    assert suitable_rate(num_weights, is_adapter=is_adapter) == pytest.approx(rate)


@pytest.mark.parametrize(("num_batches", "expected"), [(0, 8), (100, 8), (5, 4)])
def test_a_warm_up_that_nobody_chose_is_over_before_the_rate_has_fallen(
    num_batches: int, expected: int
) -> None:
    assert suitable_warmup(num_batches) == expected


def test_it_falls_in_a_line() -> None:
    rate = LearningRate(peak=1.0, decay="linear", warmup_batches=2, num_batches=12, final=0.5)
    assert [rate.at(number) for number in (2, 7, 12, 100)] == [1.0, 0.75, 0.5, 0.5]


def test_it_falls_like_a_cosine() -> None:
    rate = LearningRate(peak=2.0, decay="cosine", num_batches=8)
    assert [rate.at(number) for number in (0, 2, 4, 6, 8, 9)] == pytest.approx(
        [2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5, 0.0, 0.0]
    )


def test_a_fall_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEMIX_LEARNING_RATE_SCHEDULE", "cosine")
    monkeypatch.setenv("LEMIX_WARMUP_BATCHES", "5")
    with pytest.raises(ConfigurationError, match="needs learning_rate_batches above warmup_batches=5, not 0"):
        read_settings(TrainerSettings)
