"""A stage that dies and comes back takes the requests in flight with it, clearly, and no others."""

import asyncio
import shutil
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from msgspec import structs

from services.stage_worker.worker import LOST_AFTER_S
from shared import checkpoints, subjects
from shared.bus.base import Incoming
from shared.checkpoints import Manifest
from shared.clock import SystemClock
from shared.messages.cluster import Heartbeat
from shared.messages.inference import IterationForward
from shared.messages.training import BatchStepped, MicrobatchEntered, TrainingFailed
from shared.tensors import inline
from shared.tensors.point_to_point import CollectiveLink
from tests.support.models import save_tiny_model
from tests.support.node import Node, running_node
from tests.support.training import messages, random_batches

PROMPT = [3, 14, 15, 92, 65, 35]


@pytest.mark.parametrize(
    ("num_stages", "stage", "stages_held"), [(2, 1, 1), (3, 1, 1), (3, 2, 1), (3, 2, 2), (4, 2, 2)]
)
async def test_requests_in_flight_fail_once_and_later_ones_succeed(
    num_stages: int, stage: int, stages_held: int, tmp_path: Path
) -> None:
    save_tiny_model("llama", tmp_path / "model")
    async with running_node(tmp_path / "model", num_stages, tmp_path, stages_held=stages_held) as node:
        expected = await node.complete(PROMPT, max_tokens=12)
        lost = [await node.start(PROMPT, max_tokens=3000) for _ in range(3)]
        for answer in lost:
            await answer.first_token()
        await node.replace(stage)
        await node.ready()
        for answer in lost:
            await answer.end()
            assert answer.failure is not None
            assert (answer.failure.code, answer.finish) == (503, None)
            restarted = range(stage, min(stage + stages_held, num_stages))
            reasons = [f"stage {each} of the node was restarted" for each in restarted]
            assert answer.failure.reason in reasons
        again = await node.complete(PROMPT, max_tokens=12)
        assert again.token_ids == expected.token_ids
        assert node.heartbeats.keys() == set(range(num_stages))


class JumpingClock(SystemClock):
    """Goes on as if the process had stood still."""

    ahead_s = 0.0

    def now_s(self) -> float:
        return super().now_s() + self.ahead_s


@pytest.mark.parametrize("stages_held", [1, 2])
async def test_stages_that_stood_still_do_not_take_each_other_for_lost(
    stages_held: int, tmp_path: Path
) -> None:
    save_tiny_model("llama", tmp_path / "model")
    clock = JumpingClock()
    async with running_node(tmp_path / "model", 2, tmp_path, clock=clock, stages_held=stages_held) as node:
        beats = Counter[int]()

        async def on_heartbeat(incoming: Incoming[Heartbeat]) -> None:
            beats[incoming.message.stage] += 1

        await node.bus.subscribe(subjects.HEARTBEAT.at(), on_heartbeat)
        await node.heard(lambda: min(beats[0], beats[1]) >= 2)  # each stage has found the other one ready
        answer = await node.start(PROMPT, max_tokens=4000)
        await answer.first_token()
        clock.ahead_s += 2 * LOST_AFTER_S
        await node.heard(lambda: min(beats[0], beats[1]) >= 4)
        assert (answer.failure, answer.finish) == (None, None)
        num_tokens = len(answer.tokens)
        await node.heard(lambda: len(answer.tokens) > num_tokens)


@pytest.mark.parametrize("stages_held", [1, 2])
async def test_the_first_stage_comes_back_empty_and_serves(stages_held: int, tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "model")
    async with running_node(tmp_path / "model", 2, tmp_path, stages_held=stages_held) as node:
        expected = await node.complete(PROMPT, max_tokens=12)
        lost = await node.start(PROMPT, max_tokens=3000)
        await lost.first_token()
        await node.replace(0)
        await node.ready()
        assert (await node.complete(PROMPT, max_tokens=12)).token_ids == expected.token_ids
        await node.heard(lambda: node.heartbeats[0].kv_blocks_used == 0)


@pytest.mark.parametrize("num_stages", [2, 3])
async def test_requests_wait_until_a_new_stage_is_linked(num_stages: int, tmp_path: Path) -> None:
    """Too large to go inline, they would otherwise go down an arena that nobody reads."""
    save_tiny_model("llama", tmp_path / "model")
    last = num_stages - 1
    async with running_node(tmp_path / "model", num_stages, tmp_path) as node:
        for fence in (1, 3):
            await node.replace(last)
            assert not node.heartbeats[last].ready
            early = [await node.start(PROMPT * 60, max_tokens=4) for _ in range(3)]
            for answer in early:
                await answer.end()
                assert answer.finish == "length"
            await node.restore(fence=fence)
            (first,) = messages(f"b{fence}", random_batches(1, 1)[0], fence=fence)
            await node.feed(first)
            await node.next(MicrobatchEntered)
            await node.restore(fence=fence + 1)  # the batch is forgotten: the weights stay those of the model


@pytest.mark.parametrize(("num_stages", "stage"), [(2, 0), (2, 1), (3, 1)])
async def test_a_node_with_mixed_weights_serves_nothing_until_it_is_restored(
    num_stages: int, stage: int, tmp_path: Path
) -> None:
    save_tiny_model("llama", tmp_path / "model")
    async with running_node(tmp_path / "model", num_stages, tmp_path) as node:
        expected = await node.complete(PROMPT, max_tokens=12)
        await node.restore(fence=1)
        await step(node, "b0", fence=1)
        changed = await node.complete(PROMPT, max_tokens=12)
        await node.replace(stage)
        await node.heard(lambda: all(beat.ready for beat in node.heartbeats.values()))
        early = await node.start(PROMPT, max_tokens=12)
        node.heartbeats.clear()
        await node.heard(lambda: 0 in node.heartbeats)
        await node.heard(lambda: len(node.heartbeats) == num_stages)
        assert not node.heartbeats[0].whole
        assert early.tokens == []
        await node.restore(fence=2)
        await early.end()
        await node.ready()
    assert (early.token_ids, early.versions) == (expected.token_ids, [0] * 12)
    assert changed.token_ids != expected.token_ids


async def test_stages_that_have_loaded_different_checkpoints_of_one_name_serve_nothing(
    tmp_path: Path,
) -> None:
    """As where one was away during a rollback, and the other was restarted since."""
    model, root = tmp_path / "model", tmp_path / "checkpoints"
    folder = checkpoints.node_folder(root, 0) / checkpoints.checkpoint_name(1)
    save_tiny_model("llama", model)
    save_checkpoint(model, folder, scale=1.5)
    async with running_node(model, 2, tmp_path) as node:
        shutil.rmtree(folder)
        save_checkpoint(model, folder, scale=2.0)
        await node.replace(1)
        await node.heard(lambda: all(beat.ready for beat in node.heartbeats.values()))
        node.heartbeats.clear()
        await node.heard(lambda: 0 in node.heartbeats)
        await node.heard(lambda: len(node.heartbeats) == 2)
        assert {(beat.weights_version, beat.checkpoint) for beat in node.heartbeats.values()} == {
            (1, str(folder))
        }
        assert not node.heartbeats[0].whole
        await node.replace(0)
        await node.ready()


def save_checkpoint(model: Path, folder: Path, *, scale: float) -> None:
    """One of version 1 of the model, with other logits."""
    trained = save_tiny_model("llama", folder)
    trained.lm_head.weight.data.mul_(scale)
    trained.save_pretrained(folder)
    content = {"node": 0, "version": 1, "num_stages": 2, "model": str(model), "watermark": 0}
    empty = {"sequences": (), "rejected": (), "recent_batch_ids": (), "created_wall_s": 0.0}
    digests = {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    checkpoints.write(folder, Manifest.model_validate(content | empty | {"sha256_by_file": digests}))


async def test_stages_that_share_no_memory_are_connected(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    save_tiny_model("llama_tied", tmp_path / "model")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    async with running_node(tmp_path / "model", 2, tmp_path) as node:
        prompt = PROMPT * 60  # too large to go inline
        expected = await node.complete(prompt, max_tokens=12)
        await node.restore(fence=1)
        expected_loss = await loss_of_step(node, "b0", fence=1)
        node.workers.settings_of[1] = {"shm_dir": elsewhere}
        for fence in (2, 3):  # the second time there is a connection that breaks
            await node.replace(1)
            await node.heard(lambda: all(beat.ready for beat in node.heartbeats.values()))
            await node.restore(fence=fence)
            assert (await node.complete(prompt, max_tokens=12)).token_ids == expected.token_ids
            assert await loss_of_step(node, "b0", fence=fence) == pytest.approx(expected_loss, abs=1e-6)
        for worker in node.workers.workers.values():
            links = worker._executor._handoff._outgoing.values()  # type: ignore[attr-defined]
            assert {type(link) for link in links} == {CollectiveLink}
        assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(("stage", "other"), [(0, 1), (1, 0)])
async def test_a_connection_that_breaks_between_living_stages_is_made_anew(
    stage: int, other: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    save_tiny_model("llama", tmp_path / "model")
    async with running_node(tmp_path / "model", 2, tmp_path) as node:
        node.workers.settings_of[1] = {"shm_dir": tmp_path_factory.mktemp("elsewhere")}
        await node.replace(1)
        await node.ready()
        prompt = PROMPT * 60  # too large to go inline
        expected = await node.complete(prompt, max_tokens=12)
        await node.restore(fence=1)
        expected_loss = await loss_of_step(node, "b0", fence=1)
        instances = {number: beat.instance for number, beat in node.heartbeats.items()}
        links = node.workers.workers[stage]._executor._handoff._outgoing  # type: ignore[attr-defined]
        broken = links[other, "activations"]
        assert isinstance(broken, CollectiveLink)
        assert broken._connection is not None
        broken._connection.pair().close()  # as if the network had
        if stage == 0:
            lost = await node.complete(prompt, max_tokens=12)
            assert lost.failure is not None
            assert (lost.failure.code, lost.finish) == (503, None)
        else:
            for message in messages("b0", random_batches(1, 1)[0], fence=1):
                await node.feed(message)
            while not isinstance((await node.report()).event, TrainingFailed):
                pass

        def is_connected_anew() -> bool:
            link = links.get((other, "activations"))
            return link is not None and link._connection not in (None, broken._connection)

        await node.heard(is_connected_anew)
        await node.restore(fence=2)
        assert (await node.complete(prompt, max_tokens=12)).token_ids == expected.token_ids
        assert await loss_of_step(node, "b0", fence=2) == pytest.approx(expected_loss, abs=1e-6)
        assert {number: beat.instance for number, beat in node.heartbeats.items()} == instances


async def test_an_iteration_that_a_later_stage_loses_fails_its_requests_at_once(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "model")
    async with running_node(tmp_path / "model", 2, tmp_path) as node:
        expected = await node.complete(PROMPT, max_tokens=4)
        place = subjects.ITERATION.at(node=0, stage=1)

        spoilt = asyncio.Event()

        async def spoil(incoming: Incoming[IterationForward]) -> None:
            """Be quicker than stage 0 with the next iteration."""
            if spoilt.is_set():
                return
            spoilt.set()
            seen = incoming.message.iteration
            following = structs.replace(seen, number=seen.number + 1)
            spoilt_one = IterationForward(iteration=following, hidden=inline.put(torch.zeros(99, 32)))
            await node.bus.publish(place, spoilt_one)

        await node.bus.subscribe(place, spoil)
        answer = await node.start(PROMPT, max_tokens=3000)
        await answer.end()
        assert answer.failure is not None
        assert answer.failure.code == 503
        assert answer.failure.reason.startswith("an iteration was lost at stage 1: float32 [99, 32] for ")
        assert (await node.complete(PROMPT, max_tokens=4)).token_ids == expected.token_ids


async def loss_of_step(node: Node, batch_id: str, *, fence: int) -> float:
    """Train on one batch of one microbatch; returns its loss before the step."""
    for message in messages(batch_id, random_batches(1, 1)[0], fence=fence):
        await node.feed(message)
    event = (await node.next(BatchStepped)).event
    assert isinstance(event, BatchStepped)
    return event.loss


async def step(node: Node, batch_id: str, *, fence: int) -> None:
    """Train on one batch, hard enough for other answers."""
    node.learning_rate = 0.1
    for message in messages(batch_id, random_batches(1, 1)[0], fence=fence):
        await node.feed(message)
    await node.next(BatchStepped)
