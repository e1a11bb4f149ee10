"""What serves is compared with what trains, on real stages: an alarm comes where a served tensor is torn."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from services.stage_worker.compute.torch_executor import TorchExecutor
from services.trainer.nodes import weights_checks
from services.trainer.publication.agreement import TOLERANCES, disagreement
from shared.model.products import Product
from tests.integration.test_guard import guarded, publish, training, weights_when
from tests.support.models import save_tiny_model
from tests.support.node import running_node
from tests.support.training import ADAMW, BFLOAT16, LORA, random_batches, settings_id
from tests.support.waiting import until

NUM_VERSIONS = 5
NUM_CHECKS = 6
"""Of each version: the last ones find the copies of its weights in use."""


@pytest.fixture(autouse=True)
def gaps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """Checks follow each other at once; the largest gap of each, and the tolerance."""
    seen: list[tuple[float, float]] = []

    def noted(trained: Any, served: Any, dtype: str) -> str:
        pairs = zip(trained, served, strict=True)
        seen.append((max(abs(one - other.logprob) for one, other in pairs), TOLERANCES[dtype]))
        return disagreement(trained, served, dtype)

    monkeypatch.setattr(weights_checks, "disagreement", noted)
    monkeypatch.setattr(weights_checks, "CHECK_EVERY_S", 0.0)
    monkeypatch.setattr(weights_checks, "NUM_CHECKS", 100_000)
    return seen


@pytest.mark.parametrize(
    ("num_stages", "settings"),
    [(1, {}), (2, {}), (2, LORA), (2, BFLOAT16), (2, LORA | BFLOAT16)],
    ids=settings_id,
)
async def test_many_versions_raise_no_alarm(
    num_stages: int, settings: dict[str, Any], gaps: list[tuple[float, float]], tmp_path: Path
) -> None:
    model, run_dir = tmp_path / "model", tmp_path / "run"
    run_dir.mkdir()
    save_tiny_model("llama_tied", model)
    async with (
        running_node(model, num_stages, run_dir, **settings, **ADAMW) as node,
        training(node, model, run_dir, learning_rate=0.01),
    ):
        for number, batch in enumerate(random_batches(NUM_VERSIONS, 1)):
            await publish(node, [batch], first=number)
            await weights_when(node, lambda found, number=number: found.version == number + 1)
            enough = len(gaps) + NUM_CHECKS
            await until(lambda enough=enough: len(gaps) >= enough)
        found = await weights_when(node, lambda found: True)
    assert found.why_differing == ""
    assert all(gap <= tolerance / 4 for gap, tolerance in gaps)


def tear(product: Product) -> None:
    """Let requests go on with what the copies of other weights give: the copies say that they are fresh."""
    copies = product._copies
    assert copies is not None
    packed = torch.ops.mkldnn._reorder_linear_weight(copies.transposed.t().flip(0).contiguous(), 8)
    product._copies = replace(copies, packed=packed)


@pytest.mark.parametrize("is_guarded", [False, True])
async def test_one_torn_tensor_of_one_stage_raises_the_alarm(
    is_guarded: bool, gaps: list[tuple[float, float]], tmp_path: Path
) -> None:
    model, run_dir = tmp_path / "model", tmp_path / "run"
    run_dir.mkdir()
    save_tiny_model("llama", model)
    trainer = guarded if is_guarded else training
    async with (
        running_node(model, 2, run_dir, **ADAMW) as node,
        trainer(node, model, run_dir, learning_rate=0.003, max_held_out_rise=9.0),
    ):
        await publish(node, random_batches(1, 1))
        await weights_when(node, lambda found: found.version == 1 and found.published in (1, None))
        before = await weights_when(node, lambda found: found.why_differing is not None)
        executor = node.workers.workers[1]._executor
        assert isinstance(executor, TorchExecutor)
        enough = len(gaps) + NUM_CHECKS
        await until(lambda: len(gaps) >= enough)
        tear(executor._compute.loaded.packed.products[-1])
        after = await weights_when(node, lambda found: found.why_differing)
    assert before.why_differing == ""
    assert after.why_differing is not None and after.why_differing.startswith("version 1: a token's log-")
