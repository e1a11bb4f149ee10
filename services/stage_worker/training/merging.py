"""A stage's part in joint work of nodes: the mean of their weights, and of their gradients.

    trainer --MERGE, REDUCE--> copy --> mean with the same stage of other nodes --> hold the mean

Only holding the mean, and the copy of gradients, are ops of their own; other ops go on during the rest.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from services.stage_worker.context import WorkerContext
from services.stage_worker.pipeline.disciplines import WorkKind
from services.stage_worker.training.fenced_work import Item
from services.stage_worker.training.training import Training
from shared.bus.base import Incoming
from shared.errors import BusError, CarrierError, PeerLostError, RefusedError
from shared.messages.base import Done
from shared.messages.cluster import Rendezvous, RendezvousRequest
from shared.messages.weights import MergeGroup, MergeWeights, ReduceGradients
from shared.subjects import MERGE, REDUCE, RENDEZVOUS
from shared.task_groups import start_unless_ending

MERGE_DEADLINE_S = 600.0
RENDEZVOUS_TIMEOUT_S = 10.0

log = logging.getLogger(__name__)


class Merging:
    """Obeys the trainer; orders under another fence than the training's are refused."""

    def __init__(self, context: WorkerContext, training: Training, *, group: asyncio.TaskGroup) -> None:
        self._settings = context.settings
        self._bus = context.bus
        self._executor = context.executor
        self._queue = context.queue
        self._training = training
        self._group = group

    async def subscribe(self) -> None:
        """Listen to the trainer, and to the same stage of other nodes."""
        place = {"node": self._settings.node, "stage": self._settings.stage}
        await self._bus.respond(RENDEZVOUS.at(**place), self._on_rendezvous)
        await self._bus.respond(MERGE.at(**place), self._on_merge)
        await self._bus.subscribe(REDUCE.at(**place), self._on_reduce)

    async def _on_rendezvous(self, incoming: Incoming[RendezvousRequest]) -> Rendezvous:
        return Rendezvous(address=await self._executor.rendezvous(), settings=self._settings.alike_in_merges)

    # Weights

    async def _on_merge(self, incoming: Incoming[MergeWeights]) -> Done:
        order = incoming.message
        try:
            async with asyncio.timeout(MERGE_DEADLINE_S):
                await self._merge(order)
        except RefusedError:
            raise
        except Exception as error:
            log.exception("no merge %s", order.group.name)
            raise RefusedError(f"{type(error).__name__}: {error}") from error
        return Done()

    async def _merge(self, order: MergeWeights) -> None:
        self._training.work.check_is(order.fence)
        copied = await self._executor.copy_state()
        self._training.work.check_is(order.fence)  # else a restore may have changed what was being copied
        rendezvous = await self._rendezvous(order.group)
        await self._executor.average(copied, order.group, rendezvous, order.outer)
        adopt = partial(self._adopt_state, copied, order)
        await self._queue.do_in_turn(adopt, within_s=MERGE_DEADLINE_S)

    async def _adopt_state(self, mean: Any, order: MergeWeights) -> None:
        self._training.work.check_is(order.fence)
        await self._executor.adopt_state(mean, order.version)
        await self._training.merged(order.version, keep=order.keep)

    async def _rendezvous(self, group: MergeGroup) -> str:
        """The address where the members meet.

        Raises PeerLostError when the first one does not say, CarrierError when it trains something else.
        """
        first, stage = group.members[0].node, self._settings.stage
        if first == self._settings.node:
            return await self._executor.rendezvous()
        try:
            answer = await self._bus.request(
                RENDEZVOUS.at(node=first, stage=stage), RendezvousRequest(), timeout_s=RENDEZVOUS_TIMEOUT_S
            )
        except BusError as error:
            raise PeerLostError(f"node {first} does not say where to meet: {error}") from error
        self._check_alike(first, answer.settings)
        return answer.address

    def _check_alike(self, node: int, settings: Mapping[str, str]) -> None:
        """Check that members train the same: adapters of other modules or alphas may have equal sizes."""
        own = self._settings
        differences = [
            f"LEMIX_{name.upper()}={settings[name]} on node {node} and {value} on node {own.node}"
            for name, value in own.alike_in_merges.items()
            if settings.get(name, value) != value
        ]
        if differences:
            raise CarrierError(f"nodes that share their weights must train alike: {', '.join(differences)}")

    # Gradients

    async def _on_reduce(self, incoming: Incoming[ReduceGradients]) -> None:
        order = incoming.message
        self._in_training(order, partial(self._copy_gradients, order))

    async def _copy_gradients(self, order: ReduceGradients) -> None:
        copied = await self._executor.copy_gradients(order.batch_id)
        start_unless_ending(self._group, self._reduce(order, copied))

    async def _reduce(self, order: ReduceGradients, copied: Any) -> None:
        try:
            await self._executor.average(copied, order.group, await self._rendezvous(order.group))
        except Exception as error:
            log.exception("no mean of gradients %s", order.group.name)
            await self._training.work.failed(order.fence, _name(order), error)
            return
        self._in_training(order, partial(self._adopt_gradients, order, copied))

    async def _adopt_gradients(self, order: ReduceGradients, mean: Any) -> None:
        squared_norm = await self._executor.adopt_gradients(mean, _name(order))
        await self._training.gradients.ready(order.fence, _name(order), squared_norm)

    def _in_training(self, order: ReduceGradients, work: Callable[[], Awaitable[None]]) -> None:
        self._training.work.enqueue(WorkKind.STEP, Item(order.fence, _name(order), (), work))


def _name(order: ReduceGradients) -> str:
    """The name of the step on this node."""
    return order.batch_id or order.group.name
