"""What a stage brings to a mean of several nodes."""

from pathlib import Path

import pytest
import torch

from services.stage_worker.compute.weights import StageWeights
from services.stage_worker.training.optimizers import OptimizerSettings
from services.stage_worker.training.replica import Replica
from shared.model.loader import load_stage, model_partition, read_config
from tests.support.models import save_tiny_model

DEVICE = torch.device("cpu")


@pytest.fixture
def weights(tmp_path: Path) -> StageWeights:
    save_tiny_model("llama", tmp_path)
    (layers,) = model_partition(read_config(tmp_path), 1)
    return StageWeights(load_stage(tmp_path, layers), OptimizerSettings(), version=0)


def test_a_mean_that_a_restore_has_cut_off_cannot_write_into_later_gradients(weights: StageWeights) -> None:
    replica = Replica(weights, DEVICE, {}, is_outer=False)
    cut_off = replica.copy_gradients("")
    assert replica.copy_gradients("").tensors.flat is cut_off.tensors.flat, "one memory for all steps"

    replica.restored({})
    later = replica.copy_gradients("")
    cut_off.tensors.flat.fill_(7.0)

    assert not later.tensors.flat.any()


def test_the_memory_of_a_merge_is_let_go_with_the_last_version_that_needs_it(weights: StageWeights) -> None:
    replica = Replica(weights, DEVICE, {}, is_outer=False)
    replica.adopt_state(replica.copy_state(), version=1)
    weights.keep()
    replica.adopt_state(replica.copy_state(), version=2)
    weights.release(1)

    assert weights._spare == []
