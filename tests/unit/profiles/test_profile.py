"""Profiles by name, as files, and as what emulated devices obey."""

from pathlib import Path

import pytest

from shared.errors import ConfigurationError
from shared.profiles.profile import Profile, profile_named, stage_times
from shared.profiles.times import work_of_rows

NAME = "llama2-7b@a100"
UNSAMPLED = [
    work_of_rows(0, 97),
    work_of_rows(0, 333),
    work_of_rows(512, 200),
    work_of_rows(299, 1) * 40,
    work_of_rows(0, 150) + work_of_rows(249, 1) * 20,
    work_of_rows(512, 200) + work_of_rows(0, 333) + work_of_rows(400, 1),
]


@pytest.mark.parametrize(
    ("name", "num_stages"),
    [
        ("gpt2-small@rtx6000ada", 2),
        ("gpt2-large@rtx6000ada", 2),
        ("llama2-7b@a100", 2),
        ("llama2-13b@a100", 2),
        ("llama2-70b@a100", 8),
        ("llama2-70b@h200", 8),
    ],
)
def test_a_model_has_stages_until_its_training_fits(name: str, num_stages: int) -> None:
    profile = profile_named(name, None)
    assert profile.num_stages == len(profile.stages) == num_stages
    for stage in profile.stages:
        assert stage.memory.weights_bytes + stage.memory.training_bytes < stage.memory.capacity_bytes


@pytest.mark.parametrize("name", ["gpt2-small@rtx6000ada", "llama2-7b@a100", "gpt2-large@rtx6000ada"])
@pytest.mark.parametrize("stage", [0, 3])
def test_the_fit_of_a_computed_profile_is_its_roofline(name: str, stage: int) -> None:
    exact = stage_times(name, stage, 4)
    fitted = profile_named(name, 4).stages[stage].fitted("iteration")
    assert fitted is not None
    for work in UNSAMPLED:
        assert fitted.seconds(work) == pytest.approx(exact.iteration_s(work), rel=0.02)


def test_a_model_s_forward_is_that_of_its_stages_one_after_the_other() -> None:
    alone_s = sum(stage_times(NAME, stage, 4).iteration_s(work_of_rows(0, 150)) for stage in range(4))
    assert profile_named(NAME, 4).model_forward_s(150) == pytest.approx(alone_s, rel=0.02)


def test_a_file_says_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(profile_named(NAME, 2).model_dump_json())
    assert profile_named(str(path), None) == profile_named(NAME, 2)


def test_a_measured_last_stage_has_its_backward_in_its_forward(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(profile_named(NAME, 2).model_dump_json())
    work = work_of_rows(0, 150)
    for stage in range(2):
        exact, measured = stage_times(NAME, stage, 2), stage_times(str(path), stage, 2)
        both_s = exact.forward_s(work) + exact.backward_s(work)
        assert measured.forward_s(work) + measured.backward_s(work) == pytest.approx(both_s, rel=0.02)
        assert measured.step_s() == exact.step_s()
    assert measured.backward_s(work) == 0


@pytest.mark.parametrize("name", ["llama2-7b", "llama3-8b@a100", "llama2-7b@tpu", "absent.json"])
def test_an_unknown_name_is_the_user_s_mistake(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"llama2-7b|llama3-8b|tpu|absent\.json"):
        profile_named(name, 2)


def test_a_profile_has_the_stages_it_was_measured_with(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(profile_named(NAME, 2).model_dump_json())
    with pytest.raises(ConfigurationError, match="2 stages, not 4"):
        profile_named(str(path), 4)


def test_a_broken_file_names_its_fault(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(profile_named(NAME, 2).model_copy(update={"num_stages": 3}).model_dump_json())
    with pytest.raises(ConfigurationError, match="num_stages=3"):
        profile_named(str(path), None)
    first, last = profile_named(NAME, 2).stages
    stages = (first, last.model_copy(update={"points": ()}))
    path.write_text(profile_named(NAME, 2).model_copy(update={"stages": stages}).model_dump_json())
    with pytest.raises(ConfigurationError, match="lacks iterations"):
        profile_named(str(path), None)
    path.write_text("{}")
    with pytest.raises(ConfigurationError, match="model: Field required"):
        profile_named(str(path), None)


def test_what_memory_is_left_is_halved_between_keys_and_activations() -> None:
    memory = profile_named(NAME, 2).stages[0].memory
    left = memory.capacity_bytes - memory.weights_bytes - memory.training_bytes
    assert memory.kv_tokens * memory.kv_bytes_per_token == pytest.approx(left / 2, rel=0.001)


def test_profile_is_frozen() -> None:
    profile: Profile = profile_named(NAME, 2)
    with pytest.raises(ValueError, match="frozen"):
        profile.num_stages = 3
