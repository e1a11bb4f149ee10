"""Processes die at any point of a training run, in virtual time: the final weights are those of an
undisturbed run.

Hypothesis chooses who dies, and after how many messages. LEMIX_KILL_EXAMPLES asks for more than the few runs
of every day; they are other ones then.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from lemix.simulation.loop import run_virtual
from shared.checkpoints import Checkpoint
from tests.support.models import save_tiny_model
from tests.support.mortal_cluster import Kill, MortalCluster, victims
from tests.support.training import ADAMW, LEARNING_RATE, random_batches

BATCHES = random_batches(8, 2)
IDS = tuple(f"b{number}" for number in range(len(BATCHES)))
ASKED = os.environ.get("LEMIX_KILL_EXAMPLES")


def examples(everyday: int) -> settings:
    """So many, or as many as are asked for."""
    return settings(
        max_examples=int(ASKED or everyday),
        derandomize=ASKED is None,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


FEW = examples(8)
KILL = st.builds(Kill, st.sampled_from(victims(1)), st.integers(1, 250))
KILLS = st.lists(KILL, min_size=1, max_size=4)

ASYNC_TOLERANCE = 0.25
"""L2 distance between two final sets of weights, as a share of how far the run moved them."""


@cache
def model_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="lemix-kill-points-"))
    save_tiny_model("llama", folder)
    return folder


def train(schedule: str, seed: int, kills: Sequence[Kill] = ()) -> dict[str, Tensor]:
    """All tensors of the checkpoint that contains every batch: weights, optimizer and random states.

    `seed`: of the times that messages take.
    """
    with tempfile.TemporaryDirectory() as run_dir:
        cluster = MortalCluster(
            model=model_folder(),
            run_dir=Path(run_dir),
            seed=seed,
            trainer_settings={
                "schedule": schedule,
                "learning_rate": LEARNING_RATE,
                "microbatches": 2,
                "checkpoint_every": 3,
                "checkpoint_idle_s": 0.5,
            },
            stage_settings={"kv_tokens": 64, **ADAMW},
            kills=kills,
        )
        found = run_virtual(cluster.train(BATCHES))
        assert cluster.rejected() == []
        assert sorted(found.manifest.recent_batch_ids) == sorted(IDS), "each batch once"
        if schedule != "async":
            assert found.manifest.recent_batch_ids == IDS, "in the order of the stream"
        return tensors_of(found)


def tensors_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    files = sorted(checkpoint.folder.glob("*.safetensors"))
    return {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


@cache
def undisturbed(schedule: str) -> Mapping[str, Tensor]:
    return train(schedule, seed=0)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@FEW
@given(seed=st.integers(0, 1000), kills=KILLS)
def test_whoever_dies_the_weights_are_bit_for_bit_those_of_an_undisturbed_run(
    schedule: str, seed: int, kills: list[Kill]
) -> None:
    expected = undisturbed(schedule)
    got = train(schedule, seed, kills)

    assert got.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(got[name], expected[name])]
    assert different == []


@FEW
@given(seed=st.integers(0, 1000), kills=KILLS)
def test_without_a_flush_the_weights_differ_by_no_more_than_message_times_make_them(
    seed: int, kills: list[Kill]
) -> None:
    """Under A-PP, which version a forward meets depends on when messages come. Measured on this run: without
    any death, other message times move the final weights by 0.03 to 0.15 of the way that they went, deaths by
    0.03 to 0.16; A-PP and S-PP are 0.16 apart. A batch that were lost or doubled would show in the ids.
    """
    expected = undisturbed("async")
    got = train("async", seed, kills)

    assert distance(got, expected) <= ASYNC_TOLERANCE * distance(expected, published())


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Between the weights, L2 norm."""
    squares = [(one[name] - other[name]).square().sum() for name in weight_names(one)]
    return float(torch.stack(squares).sum().sqrt())


def weight_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Those of moments, in files or not, begin otherwise."""
    return [name for name in tensors if name.startswith("model")]


def published() -> dict[str, Tensor]:
    """The weights before training, under their names in a checkpoint."""
    plain = load_file(model_folder() / "model.safetensors")
    return {name: plain[name.partition(":")[2]] for name in weight_names(undisturbed("async"))}
