"""Settings that follow from the model, and what a person is told of them."""

import json
from math import inf
from pathlib import Path
from typing import Any

import pytest

from services.trainer.defaults import training_line, with_defaults
from services.trainer.settings import TrainerSettings
from shared.settings import EMBEDDED_MODEL


def model_of_135_million(folder: Path) -> Path:
    config = {"num_hidden_layers": 30, "hidden_size": 576, "vocab_size": 49152}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def chosen(folder: Path, **settings: Any) -> TrainerSettings:
    given = TrainerSettings(model=str(model_of_135_million(folder)), **settings)
    return with_defaults(given, folder)


def test_a_model_of_its_own_is_trained_gently_and_guarded(tmp_path: Path) -> None:
    settings = chosen(tmp_path)
    assert settings.learning_rate == pytest.approx(7.5e-6, rel=0.2)
    assert (settings.warmup_batches, settings.guard_samples) == (8, 16)
    assert "after 8 batches of warm-up, gradients clipped to 1" in training_line(settings)
    assert training_line(settings).endswith("served once 16 texts of the model's own show no damage")


def test_what_is_given_stays(tmp_path: Path) -> None:
    settings = chosen(
        tmp_path, learning_rate=0.5, guard_samples=3, held_out="mine.jsonl", max_gradient_norm=inf
    )
    assert (settings.learning_rate, settings.warmup_batches, settings.guard_samples) == (0.5, 0, 3)
    assert training_line(settings) == (
        "training: all weights, learning rate 5.0e-01, gradients not clipped, checkpoints of at most 180 "
        "GB an hour, served once 3 texts of the model's own and mine.jsonl show no damage"
    )


def test_a_warm_up_can_be_had_with_any_rate(tmp_path: Path) -> None:
    assert chosen(tmp_path, learning_rate=0.5, warmup_batches=4).warmup_batches == 4
    assert chosen(tmp_path, warmup_batches=4).warmup_batches == 4


def test_the_bundled_model_learns_unguarded() -> None:
    settings = with_defaults(TrainerSettings(), Path(EMBEDDED_MODEL))
    assert settings.guard_samples == 0
    assert "served at once" in training_line(settings)
