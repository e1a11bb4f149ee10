"""Two nodes that share their weights, and what a trainer would have them do together."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shared.messages.training import BatchReady, BatchStepped
from shared.messages.weights import MergeGroup, MergeMember, OuterStep, ServingRule
from tests.support.models import save_tiny_model
from tests.support.node import Node, running_nodes
from tests.support.plain import EPSILON, Plain, State
from tests.support.saving import adapted, name_in_stages, save, tensors_in
from tests.support.training import ADAMW, Batch, messages

NUM_STAGES = 2


@dataclass
class Pair:
    """Two nodes on one bus, and the model that they run."""

    nodes: list[Node]
    model: Any
    """As it is before any training."""
    folder: Path
    dtype: torch.dtype

    def plain(self) -> Plain:
        """One process with a copy of the model."""
        return Plain(deepcopy(self.model), dtype=self.dtype)

    async def merge(self, name: str, *shares: float, version: int, outer: OuterStep | None = None) -> None:
        """Have both hold the mean."""
        members = group(name, *shares)
        await asyncio.gather(*(node.merge(members, version, outer) for node in self.nodes))

    async def states(self, name: str = "state") -> list[State]:
        """The states of both, as `state` has them."""
        return [await self.state(node, f"{name}-{node.number}") for node in self.nodes]

    async def state(self, node: Node, name: str) -> State:
        """All that a checkpoint of the node's holds; it is written to `checkpoints/<name>`."""
        return await state_of(node, self.folder, name)


@asynccontextmanager
async def two_nodes(
    family: str, folder: Path, *, serving: ServingRule = "newest", **settings: Any
) -> AsyncIterator[Pair]:
    """Open for training: node n follows fence n + 1."""
    model = save_tiny_model(family, folder / "model").to(settings.get("device", "cpu"))
    chosen = {**ADAMW, "optimizer_epsilon": EPSILON, **settings}
    async with running_nodes(2, folder / "model", NUM_STAGES, folder, **chosen) as nodes:
        for node in nodes:
            await node.restore(fence=node.number + 1, serving=serving)
        if settings.get("adapter") == "lora":
            start = await save(nodes[0], folder / "model", 0, folder / "checkpoints" / "start")
            model = adapted(folder / "model", start)
        yield Pair(nodes, model, folder, getattr(torch, settings.get("dtype", "float32")))


async def state_of(node: Node, folder: Path, name: str) -> State:
    """All that a checkpoint of the node's holds; it is written to `checkpoints/<name>` of its folder."""
    checkpoint = folder / "checkpoints" / name
    await save(node, folder / "model", node.version, checkpoint, fence=node.fence)
    return {name_in_stages(name): tensor for name, tensor in tensors_in(checkpoint).items()}


def group(name: str, *shares: float, fences: Sequence[int] = (1, 2)) -> MergeGroup:
    """A group of the first nodes, each with its share."""
    members = (MergeMember(node=node, fence=fences[node], share=share) for node, share in enumerate(shares))
    return MergeGroup(name=name, members=tuple(members))


async def train(node: Node, batch_id: str, batch: Batch) -> None:
    """One step of this node alone."""
    for forward in messages(batch_id, batch, fence=node.fence):
        await node.feed(forward)
    await node.next(BatchStepped)


async def step_together(pair: Pair, batches: Sequence[Batch | None], number: int) -> None:
    """As the trainer has nodes of `allreduce` step; None: a node has no batch."""
    has_batch = [batch is not None for batch in batches]
    shares = [has / sum(has_batch) for has in has_batch]
    members, brought = group(f"merge-{number}", *shares), []
    for node, batch in zip(pair.nodes, batches, strict=True):
        batch_id = f"b{number}-{node.number}" if batch else ""
        brought.append(batch_id)
        if batch:
            for forward in messages(batch_id, batch, fence=node.fence):
                await node.feed(forward)
            await node.next(BatchReady)
    for node, batch_id in zip(pair.nodes, brought, strict=True):
        await node.reduce(members, batch_id)
    norms = []
    for node, batch_id in zip(pair.nodes, brought, strict=True):
        name = batch_id or members.name
        ready = await node.next(BatchReady)
        assert isinstance(ready.event, BatchReady) and ready.event.batch_id == name
        norms.append(ready.event.squared_norm)
        await node.order(ready.fence, name)
        await node.next(BatchStepped)
    assert norms[0] == norms[1]
