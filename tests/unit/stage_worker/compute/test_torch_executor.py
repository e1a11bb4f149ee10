"""What the torch executor asks of the machine, apart from computing."""

import asyncio
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from services.stage_worker.checkpoint.shard_files import (
    random_state,
    read_optimizer_state,
    read_random_state,
    take_snapshot,
    write_shard,
)
from services.stage_worker.checkpoint.staging import CpuLane
from services.stage_worker.compute import torch_executor
from services.stage_worker.compute.handoff import NUM_TIED_SLOTS
from services.stage_worker.compute.torch_executor import TorchExecutor
from services.stage_worker.settings import StageWorkerSettings
from shared.messages.training import StepOrder
from shared.model.index import write_index
from shared.model.partition import LayerRange
from tests.support.models import VOCAB_SIZE, save_tiny_model
from tests.support.training import messages, random_batches

HIDDEN_SIZE = 32
ROWS = 16


def settings_of(family: str, num_stages: int, folder: Path) -> StageWorkerSettings:
    """Settings of stage 0 of a tiny model, which is saved in the folder."""
    save_tiny_model(family, folder / "model")
    return StageWorkerSettings(
        node=0, stage=0, num_stages=num_stages, model=str(folder / "model"), run_dir=folder, shm_dir=folder
    )


async def test_only_the_tied_gradient_gets_slots_of_the_vocabularys_size(tmp_path: Path) -> None:
    save_tiny_model("llama_tied", tmp_path / "model")
    settings = StageWorkerSettings(
        node=0,
        stage=0,
        num_stages=2,
        model=str(tmp_path / "model"),
        run_dir=tmp_path,
        shm_dir=tmp_path,
        max_iteration_tokens=ROWS,
        max_microbatch_tokens=ROWS,
    )
    executor = TorchExecutor(settings, "me")
    facts = await executor.load()
    assert (facts.is_tied_across_stages, facts.vocab_size, facts.context_length) == (True, VOCAB_SIZE, 4096)
    rows = await executor.offer(1, "peer", "activations")
    tied = await executor.offer(1, "peer", "tied")
    await executor.close()
    assert (rows.purpose, rows.slot_bytes, rows.num_slots) == ("activations", ROWS * HIDDEN_SIZE * 4, 9)
    assert (tied.purpose, tied.slot_bytes) == ("tied", VOCAB_SIZE * HIDDEN_SIZE * 4)
    assert tied.num_slots == NUM_TIED_SLOTS
    assert rows.place != tied.place


@pytest.mark.parametrize("names", [{"a"}, {"b.c"}, {"a", "b.c"}, set()])
def test_a_stage_reads_the_optimizer_state_of_its_own_parameters(names: set[str], tmp_path: Path) -> None:
    for stage, name in enumerate(("a", "b.c")):
        state = {f"exp_avg.{name}": torch.ones(2), f"step.{name}": torch.ones(())}
        snapshot = take_snapshot({name: torch.zeros(2)}, state, torch.clone)
        write_shard(snapshot, tmp_path, LayerRange(stage=stage, num_stages=2, first=stage, end=stage + 1))
    found = read_optimizer_state(tmp_path, names)
    assert found.keys() == {f"{kind}.{name}" for name in names for kind in ("exp_avg", "step")}


async def test_random_numbers_come_again_after_a_restore(tmp_path: Path) -> None:
    """A model with dropout would else train otherwise after a crash."""
    settings = settings_of("llama", 2, tmp_path)
    executor = TorchExecutor(settings, "me")
    await executor.load()
    first = torch.rand(3)
    folder = tmp_path / "checkpoint"
    shutil.copytree(tmp_path / "model", folder)
    (folder / "model.safetensors").unlink()
    shard = await executor.write(await executor.snapshot(), folder)
    write_index(folder, shard.file_by_tensor, shard.size_bytes)
    after_saving = torch.rand(3)

    await executor.restore(str(folder), 1)
    assert torch.equal(torch.rand(3), after_saving)
    await executor.restore("", 0)
    assert torch.equal(torch.rand(3), first)
    await executor.close()


def test_random_states_of_another_number_of_stages_are_not_taken(tmp_path: Path) -> None:
    layers = LayerRange(stage=0, num_stages=2, first=0, end=1)
    state = random_state(torch.device("cpu"))
    write_shard(take_snapshot({"a": torch.zeros(2)}, state, torch.clone), tmp_path, layers)

    assert torch.equal(read_random_state(tmp_path, layers)["random.cpu"], state["random.cpu"])
    assert read_random_state(tmp_path, LayerRange(stage=0, num_stages=3, first=0, end=1)) == {}


async def test_a_checkpoint_has_the_weights_before_a_step_that_comes_while_it_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of("llama", 1, tmp_path)
    may_copy = threading.Event()

    class WaitingLane(CpuLane):
        def send(self, source: Tensor, buffer: Tensor) -> Callable[[], object]:
            assert may_copy.wait(30)
            return super().send(source, buffer)

    monkeypatch.setattr(torch_executor, "CpuLane", WaitingLane)
    executor = TorchExecutor(settings, "me")
    await executor.load()
    before = load_file(tmp_path / "model" / "model.safetensors")
    (batch,) = random_batches(1, 1)
    (fed,) = messages("b0", batch)
    await executor.forward(fed.microbatch, fed.tokens)
    await executor.finish_batch("b0")
    await executor.measure("b0", None)
    copying, settle = await executor.snapshot(), executor._copies.settle

    def settle_at_last() -> None:
        may_copy.set()
        settle()

    monkeypatch.setattr(executor._copies, "settle", settle_at_last)
    await executor.step(StepOrder(fence=1, batch_id="b0", version=1, learning_rate=0.1))
    saved, after = copying.result(30).weights, (await executor.snapshot()).result(30).weights
    await executor.close()
    assert all(torch.equal(saved[name], before[name]) for name in before)
    assert not any(torch.equal(after[name], before[name]) for name in before)


class SlowTime:
    """Of an op that the device has done when the test says so."""

    def __init__(self, is_done: threading.Event) -> None:
        self._is_done = is_done

    def is_over(self) -> bool:
        return self._is_done.is_set()

    def wait_s(self) -> float:
        self._is_done.wait(30)
        return 0.25


async def test_a_training_op_is_over_when_the_device_has_done_it_and_others_are_launched_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = settings_of("llama", 1, tmp_path).model_copy(update={"discipline": "fifo"})
    is_done = threading.Event()
    monkeypatch.setattr(torch_executor, "timer_for", lambda device: lambda: lambda: (SlowTime(is_done),))
    executor = TorchExecutor(whole, "me")
    await executor.load()
    (batch,) = random_batches(1, 1)
    (fed,) = messages("b0", batch)
    forward = asyncio.create_task(executor.forward(fed.microbatch, fed.tokens))
    await executor.keep()  # the compute thread has launched the forward, and is free
    assert not forward.done()
    is_done.set()
    output = await forward
    assert output.loss is not None
    assert [part.wait_s() for part in output.took] == [0.25]
    await executor.finish_batch("b0")
    await executor.measure("b0", None)
    await executor.step(StepOrder(fence=1, batch_id="b0", version=1, learning_rate=0.1))
    await executor.close()
