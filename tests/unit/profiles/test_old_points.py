"""Points of old profiles, which did not say what they read."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lemix.profiling.grid import IterationShape, decoding, grid_for, mixed, prefill
from shared.errors import ConfigurationError
from shared.messages.events import OpKind
from shared.profiles.profile import profile_named, read_profile
from shared.profiles.records import ProfilePoint
from shared.profiles.times import NO_WORK, Work, work_of_rows


def work_of(chunks: tuple[tuple[int, int], ...]) -> Work:
    return sum((work_of_rows(start, num_tokens) for start, num_tokens in chunks), NO_WORK)


def old(work: Work, kind: OpKind = "iteration") -> dict[str, Any]:
    point = ProfilePoint.of(kind, work, 0.1).model_dump()
    del point["num_context_tokens"]
    return point


@pytest.mark.parametrize(
    "shape",
    [
        prefill(0, 1),
        prefill(0, 512),
        prefill(128, 64),
        decoding(1, 16),
        decoding(32, 512),
        decoding(8, 1),
        mixed(2, 512, 0, 8),
        mixed(32, 512, 0, 512),
        mixed(8, 512, 0, 1),
    ],
)
def test_a_point_of_the_old_grid_reads_what_it_did(shape: IterationShape) -> None:
    work = work_of(shape.chunks)
    assert ProfilePoint.model_validate(old(work)).work == work


def test_training_reads_its_rows() -> None:
    for lengths in grid_for(1024, is_quick=False).microbatches:
        work = work_of(tuple((0, length) for length in lengths))
        assert ProfilePoint.model_validate(old(work, "backward")).work == work


def test_a_point_that_cannot_be_told_is_refused_with_its_numbers() -> None:
    two_prompts = work_of(((0, 30), (0, 70)))
    with pytest.raises(ValidationError, match=r"\[100, 2950, 2\].*num_context_tokens"):
        ProfilePoint.model_validate(old(two_prompts))


def test_an_old_file_is_read_and_a_point_of_doubt_is_named(tmp_path: Path) -> None:
    profile, path = profile_named("gpt2-small@rtx6000ada", 2), tmp_path / "old.json"
    document = profile.model_dump(mode="json")
    for stage in document["stages"]:
        for point in stage["points"]:
            del point["num_context_tokens"]
    path.write_text(json.dumps(document))
    assert read_profile(path) == profile
    document["stages"][1]["points"][0].update(num_tokens=7, num_pairs=17, num_sequences=2)
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigurationError, match=r"stages\.1\.points\.0.*num_context_tokens"):
        read_profile(path)
