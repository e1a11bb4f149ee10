"""A node that learns preferences, against the formula of their loss in one process."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from shared.messages.training import BatchStepped
from tests.support.models import save_tiny_model
from tests.support.node import Node, running_node
from tests.support.pair import train, two_nodes
from tests.support.preferences import Pair, dpo_loss, preference_messages, random_pairs
from tests.support.saving import adapted, model_in, save
from tests.support.training import ADAMW, LORA, adamw, assert_equal, messages, random_batches, settings_id

PAIRS = random_pairs(7)
BATCHES = [[PAIRS[:2], PAIRS[2:3]], [PAIRS[3:4], PAIRS[4:]], [PAIRS[1:3], PAIRS[5:6]]]


async def learn(
    node: Node, batch_id: str, microbatches: Sequence[Sequence[Pair]], *, fence: int = 1
) -> float:
    """Returns the loss that the node tells."""
    for forward in preference_messages(batch_id, microbatches, fence=fence):
        await node.feed(forward)
    while True:
        event = (await node.next(BatchStepped)).event
        assert isinstance(event, BatchStepped)
        if event.batch_id == batch_id:
            return event.loss


@pytest.mark.parametrize(
    ("num_stages", "stages_held", "settings"), [(1, 1, {}), (2, 1, {}), (3, 2, LORA)], ids=settings_id
)
async def test_preferences_are_learnt_as_in_one_process_also_after_a_restart(
    num_stages: int, stages_held: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    """The reference stays the model as it was given, whatever the stage holds when they first come."""
    folder, root, losses = tmp_path / "model", tmp_path / "checkpoints", []
    save_tiny_model("llama_tied", folder)
    chosen = {**ADAMW, **settings, "stages_held": stages_held}
    async with running_node(folder, num_stages, tmp_path, **chosen) as node:
        await node.restore()
        start = await save(node, folder, 0, root / "start")
        losses += [await learn(node, f"b{number}", BATCHES[number]) for number in (0, 1)]
        saved = await save(node, folder, 2, root / "saved")
    async with running_node(folder, num_stages, tmp_path, **chosen) as node:
        await node.restore(version=2, checkpoint=str(saved))
        losses.append(await learn(node, "b2", BATCHES[2]))
        end = await save(node, folder, 3, root / "end")
    given = AutoModelForCausalLM.from_pretrained(folder)
    model: Any = adapted(folder, start) if settings else AutoModelForCausalLM.from_pretrained(folder)
    optimizer = adamw([each for each in model.parameters() if each.requires_grad])
    for microbatches, loss in zip(BATCHES, losses, strict=True):
        expected = dpo_loss(model, given, microbatches)
        assert loss == pytest.approx(expected.item(), abs=1e-5)
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()
    learnt = model.merge_and_unload() if settings else model
    assert_equal(model_in(end, folder).state_dict(), learnt.state_dict())


async def test_after_a_merge_the_reference_is_still_the_model_as_it_was_given(tmp_path: Path) -> None:
    async with two_nodes("llama", tmp_path) as pair:
        for node, batch in zip(pair.nodes, random_batches(2, 1), strict=True):
            await train(node, "b", batch)
        await pair.merge("mean", 0.5, 0.5, version=1)
        await pair.state(pair.nodes[0], "merged")
        losses = [await learn(node, "p", BATCHES[0], fence=node.number + 1) for node in pair.nodes]
    merged = model_in(tmp_path / "checkpoints" / "merged", tmp_path / "model")
    expected = dpo_loss(merged, pair.model, BATCHES[0]).item()
    assert losses == pytest.approx([expected] * 2, abs=1e-5)
    assert abs(expected - math.log(2)) > 1e-3, "the merged weights are those of the reference"


async def test_preferences_and_other_batches_follow_each_other_and_a_restore_drops_what_is_under_way(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "model"
    save_tiny_model("llama", folder)
    (batch,) = random_batches(1, 2)
    async with running_node(folder, 2, tmp_path, **ADAMW) as node:
        await node.restore()
        first = await learn(node, "a", BATCHES[0])
        for forward in messages("b", batch):
            await node.feed(forward)
        await node.next(BatchStepped)
        await learn(node, "c", BATCHES[0])
        for forward in preference_messages("d", BATCHES[1]):
            await node.feed(forward)
        await node.restore(fence=2)
        again = await learn(node, "e", BATCHES[0], fence=2)
    assert again == first
