"""Room for keys and values, counted by hand."""

from pathlib import Path

import pytest
import torch

from services.stage_worker.compute.memory import (
    DeviceMemory,
    blocks_that_fit,
    num_kv_blocks,
    training_bytes,
    weight_bytes,
)
from services.stage_worker.compute.weights import StageWeights
from services.stage_worker.settings import StageWorkerSettings
from services.stage_worker.training.optimizers import OptimizerSettings
from shared.errors import ConfigurationError
from shared.model.loader import load_stage, model_partition, read_config
from shared.model.stage import Stage
from tests.support.models import VOCAB_SIZE, save_tiny_model


def settings(**fields: object) -> StageWorkerSettings:
    return StageWorkerSettings.given(**{"node": 0, "stage": 0, "num_stages": 1, **fields})


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    save_tiny_model("llama_tied", tmp_path)
    (layers,) = model_partition(read_config(tmp_path), 1)
    return load_stage(tmp_path, layers)


@pytest.mark.parametrize(
    ("free", "num_stages", "num_blocks"),
    [(900, 1, 49), (450, 1, 4), (900, 2, 4), (300, 1, -11)],
)
def test_a_stage_takes_its_part_and_no_more_than_is_free(free: int, num_stages: int, num_blocks: int) -> None:
    """Of 1000 bytes 900 may be taken: 100 for weights, 300 for training, 10 a block and the dummy block."""
    memory = DeviceMemory(free=free, total=1000)
    sizes = {"held": 100, "training": 300, "block_bytes": 10}
    assert blocks_that_fit(memory, share=0.9, num_stages=num_stages, **sizes) == num_blocks


@pytest.mark.parametrize(("dtype", "at_rest", "more"), [(torch.float32, 4, 32), (torch.bfloat16, 6, 22)])
def test_bytes_of_a_parameter_are_those_of_the_table_of_training(
    stage: Stage, dtype: torch.dtype, at_rest: int, more: int
) -> None:
    num_params = sum(each.numel() for each in stage.trainable_tensors().values())
    StageWeights(stage, OptimizerSettings(), version=0, dtype=dtype)
    assert weight_bytes(stage, dtype) == num_params * at_rest
    without = training_bytes(stage, dtype, settings(max_microbatch_tokens=100))
    with_more = training_bytes(stage, dtype, settings(max_microbatch_tokens=200))
    of_activations = with_more - without
    assert without - of_activations == num_params * more
    per_token = 34 * stage.hidden_size * stage.layers.num_layers + 6 * VOCAB_SIZE
    assert of_activations == 100 * per_token * dtype.itemsize // 2


def test_room_that_was_asked_for_is_given_whatever_the_memory(stage: Stage) -> None:
    for memory in (None, DeviceMemory(free=1, total=2)):
        asked = settings(kv_tokens=33, kv_block_size=16)
        assert num_kv_blocks(asked, stage, torch.float32, block_bytes=1, memory=memory) == 3
    assert num_kv_blocks(settings(), stage, torch.float32, block_bytes=1, memory=None) == 1024


def test_a_device_that_is_too_small_is_refused_with_what_can_be_done(stage: Stage) -> None:
    memory = DeviceMemory(free=2**20, total=2**30)
    with pytest.raises(ConfigurationError, match=r"no room for keys and values.*LEMIX_ADAPTER=lora"):
        num_kv_blocks(settings(device="cuda:0"), stage, torch.float32, block_bytes=2**20, memory=memory)


def test_the_log_says_how_many_tokens_fit(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    memory = DeviceMemory(free=2**33, total=2**33)
    with caplog.at_level("INFO"):
        blocks = num_kv_blocks(settings(), stage, torch.float32, block_bytes=2**16, memory=memory)
    assert f"room for {16 * blocks} tokens" in caplog.text


def test_stages_of_one_process_share_what_their_device_has() -> None:
    stages = settings(num_stages=3, stages_held=3, device="cuda:0,cuda:1").of_stages
    assert [one.stages_on_device for one in stages] == [2, 1, 2]
