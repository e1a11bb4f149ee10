"""What the torch executor asks of the machine, apart from computing."""

from pathlib import Path

import pytest
import torch

from services.stage_worker.checkpoint import read_optimizer_state, take_snapshot, write_shard
from services.stage_worker.executor.torch import NUM_TIED_SLOTS, TorchExecutor
from services.stage_worker.settings import StageWorkerSettings
from shared.model.partition import LayerRange
from tests.support.models import VOCAB_SIZE, save_tiny_model

HIDDEN_SIZE = 32
ROWS = 16


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
    assert (rows.purpose, rows.slot_bytes, rows.num_slots) == ("activations", ROWS * HIDDEN_SIZE * 4, 6)
    assert (tied.purpose, tied.slot_bytes) == ("tied", VOCAB_SIZE * HIDDEN_SIZE * 4)
    assert tied.num_slots == NUM_TIED_SLOTS
    assert rows.place != tied.place


@pytest.mark.parametrize("names", [{"a"}, {"b.c"}, {"a", "b.c"}, set()])
def test_a_stage_reads_the_optimizer_state_of_its_own_parameters(names: set[str], tmp_path: Path) -> None:
    for stage, name in enumerate(("a", "b.c")):
        state = {f"exp_avg.{name}": torch.ones(2), f"step.{name}": torch.ones(())}
        snapshot = take_snapshot({name: torch.zeros(2)}, state)
        write_shard(snapshot, tmp_path, LayerRange(stage=stage, num_stages=2, first=stage, end=stage + 1))
    found = read_optimizer_state(tmp_path, names)
    assert found.keys() == {f"{kind}.{name}" for name in names for kind in ("exp_avg", "step")}
