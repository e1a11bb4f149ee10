"""What a stage begins with: its node's newest checkpoint, if that is one of its model."""

from pathlib import Path

import pytest

from services.stage_worker.compute.torch_executor import TorchExecutor
from services.stage_worker.settings import StageWorkerSettings
from shared import checkpoints
from shared.checkpoints import Manifest
from shared.errors import ConfigurationError
from shared.settings import EMBEDDED_MODEL


def checkpoint(run_dir: Path, **fields: object) -> Path:
    folder = checkpoints.node_folder(run_dir / "checkpoints", 0) / checkpoints.checkpoint_name(1)
    folder.mkdir(parents=True)
    content = {"node": 0, "version": 1, "num_stages": 1, "watermark": 0, "created_wall_s": 0.0}
    empty = {"sequences": (), "rejected": (), "recent_batch_ids": (), "sha256_by_file": {}}
    checkpoints.write(folder, Manifest.model_validate(content | empty | fields))
    return folder


async def refusal(run_dir: Path, *, restored_from: Path | None = None, **fields: object) -> str:
    settings = StageWorkerSettings.given(
        **{"node": 0, "stage": 0, "num_stages": 1, "run_dir": run_dir, **fields}
    )
    executor = TorchExecutor(settings, "a")
    try:
        with pytest.raises(ConfigurationError) as caught:
            await executor.load()
            await executor.restore(str(restored_from), 1)
    finally:
        await executor.close()
    return str(caught.value)


async def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, model="other")
    assert "is a checkpoint of model 'other'" in await refusal(tmp_path)


async def test_a_restore_of_another_model_is_refused(tmp_path: Path) -> None:
    elsewhere = checkpoint(tmp_path / "elsewhere", model="other")
    assert "is a checkpoint of model 'other'" in await refusal(tmp_path, restored_from=elsewhere)


@pytest.mark.parametrize("merge", ["average", "outer", "allreduce"])
async def test_where_nodes_share_their_weights_the_newest_checkpoint_of_any_counts(
    merge: str, tmp_path: Path
) -> None:
    checkpoint(tmp_path, model="other")
    assert "node-0/step-00000001" in await refusal(tmp_path, node=1, merge=merge)


@pytest.mark.parametrize(
    ("saved", "wanted", "message"),
    [("lora", "none", "LEMIX_ADAPTER=lora, not none"), ("", "lora", "LEMIX_ADAPTER=none, not lora")],
)
async def test_a_checkpoint_of_what_this_run_does_not_train_is_refused(
    saved: str, wanted: str, message: str, tmp_path: Path
) -> None:
    made = checkpoint(tmp_path, model=EMBEDDED_MODEL, adapter=saved)
    assert message in await refusal(tmp_path, adapter=wanted)
    empty = tmp_path / "empty"
    assert message in await refusal(empty, adapter=wanted, restored_from=made)
