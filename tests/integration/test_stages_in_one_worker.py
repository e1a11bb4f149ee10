"""A process that holds several stages: nothing they tell each other leaves it, no tensor stays behind."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from services.stage_worker.settings import StageWorkerSettings
from shared.bus.memory import MemoryBroker
from shared.messages.base import Message
from tests.integration.test_pipeline_training import Feeder
from tests.support.models import save_tiny_model
from tests.support.node import running_node
from tests.support.training import ADAMW, random_batches

PROMPT = [3, 14, 15, 92, 65, 35]
BETWEEN_STAGES = re.compile(
    r"lemix\.node\.0\.(sampled|heartbeat|stage\.\d\.(iteration|backward|tied|link)|stage\.1\.forward)"
)


async def subjects_on_the_wire(stages_held: int, folder: Path) -> set[str]:
    """Of a node of two stages that answers and trains; each kind of message between stages is named once."""
    seen: set[str] = set()

    def observe(subject: str, message: Message, now_s: float) -> None:
        seen.add(subject)

    save_tiny_model("llama_tied", folder / "model")
    broker = MemoryBroker(observe=observe)
    held = {**ADAMW, "stages_held": stages_held}
    async with running_node(folder / "model", 2, folder, broker=broker, **held) as node:
        assert (await node.complete(PROMPT, max_tokens=4)).finish == "length"
        await node.restore()
        await Feeder(node).sync(random_batches(2, 2))
    return seen


@pytest.mark.parametrize("stages_held", [1, 2])
async def test_messages_between_stages_of_one_worker_stay_in_it(stages_held: int, tmp_path: Path) -> None:
    seen = await subjects_on_the_wire(stages_held, tmp_path)
    assert {"lemix.cluster.heartbeat", "lemix.train.report", "lemix.node.0.stage.0.forward"} <= seen
    between = {match[1] for subject in seen if (match := BETWEEN_STAGES.fullmatch(subject))}
    everything = {"sampled", "heartbeat", "stage.1.iteration", "stage.1.forward", "stage.0.backward"}
    links = {f"stage.{stage}.{kind}" for stage in (0, 1) for kind in ("link", "tied")}
    assert between == (everything | links if stages_held == 1 else set())


async def test_no_tensor_is_left_between_the_stages(tmp_path: Path) -> None:
    save_tiny_model("llama_tied", tmp_path / "model")
    held = {**ADAMW, "stages_held": 2}
    async with running_node(tmp_path / "model", 2, tmp_path, **held) as node:
        assert (await node.complete(PROMPT, max_tokens=4)).finish == "length"
        await node.restore()
        feeder = Feeder(node)
        await feeder.sync(random_batches(1, 2))
        await node.restore(fence=2)
        (worker, other) = node.workers.workers.values()
        assert worker._executor._local is other._executor._local  # type: ignore[attr-defined]
        unread: Sequence[dict[int, object]] = [*worker._executor._local.tensors._unread.values()]  # type: ignore[attr-defined]
    assert len(unread) == 4
    assert not any(unread)


def settings(**changes: object) -> StageWorkerSettings:
    return StageWorkerSettings.given(node=0, stage=1, num_stages=4, **changes)


def test_devices_are_dealt_out_to_the_stages_of_a_process() -> None:
    stages = settings(stages_held=3, device="cuda:0,cuda:1").of_stages
    assert [(each.stage, each.stages_held, each.device) for each in stages] == [
        (1, 1, "cuda:0"),
        (2, 1, "cuda:1"),
        (3, 1, "cuda:0"),
    ]


def test_a_process_is_named_after_its_stages() -> None:
    assert settings().process_name == "stage_worker.0.1"
    assert settings(stages_held=3).process_name == "stage_worker.0.1-3"
