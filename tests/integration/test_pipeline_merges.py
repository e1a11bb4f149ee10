"""Two nodes that become one, against plain loops in one process; real gloo over loopback."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from copy import deepcopy
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shared.bus.memory import MemoryBroker
from shared.errors import RefusedError
from shared.messages.base import Message
from shared.messages.cluster import RendezvousRequest
from shared.messages.training import (
    GradientsReady,
    ShardSaved,
    StageReport,
    StepDone,
    TrainingFailed,
)
from shared.messages.weights import MergeGroup, MergeMember
from shared.model.index import write_index
from shared.subjects import RENDEZVOUS
from tests.support.models import save_tiny_model
from tests.support.node import Node, running_node
from tests.support.plain_loop import (
    EPSILON,
    OUTER,
    Plain,
    State,
    assert_close,
    assert_identical,
    diloco,
    mean,
)
from tests.support.training import ADAMW, Batch, messages, random_batches

NUM_STAGES = 2
BATCHES = random_batches(8, 2)


@dataclass
class Pair:
    """Two nodes on one bus, and the model that they run."""

    nodes: list[Node]
    model: Any
    folder: Path


@asynccontextmanager
async def two_nodes(family: str, folder: Path, **settings: Any) -> AsyncIterator[Pair]:
    """Open for training: node n follows epoch n + 1."""
    model, broker = save_tiny_model(family, folder / "model"), MemoryBroker()
    async with AsyncExitStack() as stack:
        nodes = []
        for number in range(2):
            chosen = {**ADAMW, "optimizer_epsilon": EPSILON, **settings}
            running = running_node(
                folder / "model", NUM_STAGES, folder, number=number, broker=broker, **chosen
            )
            nodes.append(await stack.enter_async_context(running))
            await nodes[-1].restore(epoch=number + 1)
        yield Pair(nodes, model, folder)


def group(name: str, *shares: float, epochs: Sequence[int] = (1, 2)) -> MergeGroup:
    """Of the first nodes, each with its share."""
    members = (MergeMember(node=node, epoch=epochs[node], share=share) for node, share in enumerate(shares))
    return MergeGroup(name=name, members=tuple(members))


async def told(node: Node, kind: type[Message]) -> list[StageReport]:
    """The next report of that kind of every stage, by stage."""
    reports: dict[int, StageReport] = {}
    while len(reports) < node.num_stages:
        report = await node.report()
        assert not isinstance(report.event, TrainingFailed), report.event
        if isinstance(report.event, kind):
            reports[report.stage] = report
    return [reports[stage] for stage in range(node.num_stages)]


async def train(node: Node, batch_id: str, batch: Batch) -> None:
    """One step of this node alone."""
    for forward in messages(batch_id, batch, epoch=node.number + 1):
        await node.feed(forward)
    await told(node, StepDone)


async def state_of(node: Node, folder: Path) -> State:
    """All that a checkpoint of the node's holds, written there; what two stages hold is the same."""
    shutil.copytree(folder.parents[1] / "model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    await node.save(node.version, folder, epoch=node.number + 1)
    files: dict[str, str] = {}
    for report in await told(node, ShardSaved):
        assert isinstance(report.event, ShardSaved)
        files |= report.event.file_by_tensor
    write_index(folder, files, 0)
    state: State = {}
    for path in sorted(folder.glob("*.safetensors")):  # noqa: ASYNC240
        for name, tensor in load_file(path).items():
            assert name not in state or torch.equal(state[name], tensor), name
            state[name] = tensor
    return state


async def step_together(pair: Pair, batches: Sequence[Batch | None], number: int) -> None:
    """As the trainer has nodes of `allreduce` step; None: a node has no batch."""
    has_batch = [batch is not None for batch in batches]
    shares = [has / sum(has_batch) for has in has_batch]
    members, brought = group(f"merge-{number}", *shares), []
    for node, batch in zip(pair.nodes, batches, strict=True):
        batch_id = f"b{number}-{node.number}" if batch else ""
        brought.append(batch_id)
        if batch:
            for forward in messages(batch_id, batch, epoch=node.number + 1):
                await node.feed(forward)
            await told(node, GradientsReady)
    for node, batch_id in zip(pair.nodes, brought, strict=True):
        await node.reduce(members, batch_id)
    norms = []
    for node, batch_id in zip(pair.nodes, brought, strict=True):
        name = batch_id or members.name
        ready = await told(node, GradientsReady)
        events = [report.event for report in ready if isinstance(report.event, GradientsReady)]
        assert {event.batch_id for event in events} == {name}
        norms.append([event.squared_norm for event in events])
        await node.order(ready[0].epoch, name)
        await told(node, StepDone)
    assert norms[0] == norms[1]


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
async def test_steps_on_the_mean_of_gradients_equal_one_process(family: str, tmp_path: Path) -> None:
    steps: list[list[Batch | None]] = [[BATCHES[0], BATCHES[1]], [None, BATCHES[2]], [BATCHES[3], BATCHES[4]]]
    async with two_nodes(family, tmp_path) as pair:
        for node in pair.nodes:
            node.orders_steps = False
        for number, batches in enumerate(steps):
            await step_together(pair, batches, number)
        states = [await state_of(node, tmp_path / "checkpoints" / str(node.number)) for node in pair.nodes]

    plain = Plain(pair.model)
    for batches in steps:
        gradients = [plain.gradients(batch) for batch in batches if batch]
        plain.step([torch.stack(each).mean(dim=0) for each in zip(*gradients, strict=True)])
    assert_identical(*states)
    assert_close(states[0], plain.state())


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
async def test_a_merge_is_the_mean_of_what_nodes_have_learnt_apart(family: str, tmp_path: Path) -> None:
    async with two_nodes(family, tmp_path) as pair:
        first, second = pair.nodes
        await train(first, "a0", BATCHES[0])
        await train(first, "a1", BATCHES[1])
        await train(second, "b0", BATCHES[2])
        members = group("merge-1", 2 / 3, 1 / 3)
        await asyncio.gather(first.merge(members, 3), second.merge(members, 3))
        states = [await state_of(node, tmp_path / "checkpoints" / str(node.number)) for node in pair.nodes]

    apart = [Plain(deepcopy(pair.model)), Plain(pair.model)]
    apart[0].train(BATCHES[0])
    apart[0].train(BATCHES[1])
    apart[1].train(BATCHES[2])
    assert_identical(*states)
    assert_close(states[0], mean([each.state() for each in apart], [2 / 3, 1 / 3]))


async def test_a_node_that_has_learnt_nothing_gets_what_the_other_has(tmp_path: Path) -> None:
    async with two_nodes("llama", tmp_path) as pair:
        first, second = pair.nodes
        await train(first, "a0", BATCHES[0])
        before = await state_of(first, tmp_path / "checkpoints" / "before")
        members = group("merge-1", 1.0, 0.0)
        await asyncio.gather(first.merge(members, 1), second.merge(members, 1))
        assert_identical(await state_of(second, tmp_path / "checkpoints" / "after"), before)


async def test_three_outer_steps_equal_a_plain_loop_of_diloco_across_a_restart(tmp_path: Path) -> None:
    async with two_nodes("llama_tied", tmp_path, merge="outer") as pair:
        for number in range(3):
            for node in pair.nodes:
                await train(node, f"b{number}-{node.number}", BATCHES[2 * number + node.number])
            members = group(f"merge-{number}", 0.5, 0.5)
            version = 2 * number + 2
            await asyncio.gather(*(node.merge(members, version, OUTER) for node in pair.nodes))
            folder = tmp_path / "checkpoints" / f"step-{version}"
            saved = await state_of(pair.nodes[0], folder)
            if number == 0:  # as one that comes back: from the other's checkpoint
                await train(pair.nodes[1], "lost", BATCHES[7])
                await pair.nodes[1].restore(epoch=2, version=version, checkpoint=str(folder))
        states = [await state_of(node, tmp_path / "checkpoints" / str(node.number)) for node in pair.nodes]

    apart = [Plain(deepcopy(pair.model)), Plain(pair.model)]
    state = {name: value.detach().clone() for name, value in apart[0].parameters.items()}
    momentum = {name: torch.zeros_like(value) for name, value in state.items()}
    for number in range(3):
        for place, plain in enumerate(apart):
            plain.train(BATCHES[2 * number + place])
        state = diloco(state, momentum, mean([plain.state() for plain in apart], [0.5, 0.5]))
        for plain in apart:
            plain.hold(state)
    assert_identical(*states)
    assert_identical(saved, states[0])
    assert_close(states[0], state | {f"outer_momentum.{name}": value for name, value in momentum.items()})


async def test_a_node_alone_makes_the_outer_step_too(tmp_path: Path) -> None:
    async with two_nodes("llama", tmp_path, merge="outer") as pair:
        await train(pair.nodes[0], "a0", BATCHES[0])
        await pair.nodes[0].merge(group("merge-1", 1.0), 1, OUTER)
        got = await state_of(pair.nodes[0], tmp_path / "checkpoints" / "0")

    plain = Plain(pair.model)
    start = {name: value.detach().clone() for name, value in plain.parameters.items()}
    plain.train(BATCHES[0])
    assert_close(
        got, diloco(start, {name: torch.zeros_like(value) for name, value in start.items()}, plain.state())
    )


async def test_requests_are_answered_while_a_merge_waits_and_decode_through_it(tmp_path: Path) -> None:
    async with two_nodes("llama", tmp_path) as pair:
        first, second = pair.nodes
        await train(first, "a0", BATCHES[0])
        members = group("merge-1", 1.0, 0.0)
        merging = asyncio.create_task(first.merge(members, 7))
        whole = await first.complete([5, 9], max_tokens=8)
        assert not merging.done(), "the other node has not been asked yet"
        assert (len(whole.tokens), set(whole.versions)) == (8, {1})

        long = await first.start([3, 1, 4], max_tokens=600)
        await long.first_token()
        await asyncio.gather(merging, second.merge(members, 7))
        await long.end()
        assert (long.failure, len(long.tokens), long.finish) == (None, 600, "length")
        assert long.versions == sorted(long.versions)
        assert set(long.versions) == {1, 7}

        answers = [await node.complete([5, 9], max_tokens=20) for node in pair.nodes]
        assert answers[0].token_ids == answers[1].token_ids
        assert answers[0].token_ids[:8] == whole.token_ids


def join_and_die(address: str, name: str) -> None:
    """A member in a process of its own that gets as far as the mean."""
    import os

    from shared.tensors.collective import CollectiveGroup
    from shared.tensors.rendezvous import join_store

    CollectiveGroup(
        join_store(address, timeout_s=60.0),
        name,
        member=1,
        members=(0, 1),
        device=torch.device("cpu"),
        timeout_s=60.0,
    )
    os._exit(1)


async def test_a_member_that_is_killed_in_a_merge_leaves_the_weights_as_they_were(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "model")
    async with running_node(tmp_path / "model", NUM_STAGES, tmp_path, **ADAMW) as node:
        await node.restore(epoch=1)
        await train(node, "a0", BATCHES[0])
        before = await state_of(node, tmp_path / "checkpoints" / "before")
        spawn = get_context("spawn")
        dying = []
        for stage in range(NUM_STAGES):
            place = RENDEZVOUS.at(node=0, stage=stage)
            met = await node.bus.request(place, RendezvousRequest(), timeout_s=60.0)
            dying.append(spawn.Process(target=join_and_die, args=(met.address, "0.1-1.2")))
            dying[-1].start()
        with pytest.raises(RefusedError, match="PeerLostError"):
            await node.merge(group("merge-1", 0.5, 0.5), 3)
        for process in dying:
            process.join()
        assert_identical(await state_of(node, tmp_path / "checkpoints" / "after"), before)
        answer = await node.complete([5, 9], max_tokens=8)
        assert (len(answer.tokens), set(answer.versions)) == (8, {1})
        await train(node, "a1", BATCHES[1])


async def test_a_member_that_does_not_come_is_waited_for_in_bounds(tmp_path: Path) -> None:
    async with two_nodes("llama", tmp_path, collective_timeout_s=0.5) as pair:
        with pytest.raises(RefusedError, match=r"\[1\] did not come"):
            await pair.nodes[0].merge(group("merge-1", 0.5, 0.5), 3)


async def test_a_merge_of_another_epoch_or_without_its_first_member_is_refused(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "model")
    async with running_node(tmp_path / "model", NUM_STAGES, tmp_path, number=1) as node:
        await node.restore(epoch=2)
        with pytest.raises(RefusedError, match="epoch 1 is not 2"):
            await node.merge(group("m", 0.5, 0.5), 3, epoch=1)
        with pytest.raises(RefusedError, match="node 0 does not say where to meet"):
            await node.merge(group("m", 0.5, 0.5), 3)


async def test_gradients_that_find_no_peer_fail_the_batch_without_fault(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "model")
    async with running_node(tmp_path / "model", NUM_STAGES, tmp_path, number=1) as node:
        await node.restore(epoch=2)
        await node.reduce(group("merge-1", 1.0, 0.0), "")
        report = await node.report()
    event = report.event
    assert isinstance(event, TrainingFailed)
    assert (event.batch_id, event.is_batch_at_fault) == ("merge-1", False)


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
async def test_a_checkpoint_of_merged_weights_is_every_nodes(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "merged"
    async with two_nodes(family, tmp_path) as pair:
        first, second = pair.nodes
        await train(first, "a0", BATCHES[0])
        await train(second, "b0", BATCHES[1])
        members = group("merge-1", 0.5, 0.5)
        await asyncio.gather(first.merge(members, 2), second.merge(members, 2))
        await state_of(first, folder)
        await train(first, "a1", BATCHES[2])
        await train(second, "lost", BATCHES[3])
        await second.restore(epoch=2, version=2, checkpoint=str(folder))
        await train(second, "a1", BATCHES[2])
        states = [await state_of(node, tmp_path / "checkpoints" / str(node.number)) for node in pair.nodes]
    assert_identical(*states)
