"""Commands to all stages of a node, and work on the disk, as the service awaits them."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from shared.bus.base import Bus
from shared.errors import BusError
from shared.messages.base import Done, Message
from shared.subjects import RequestTopic

M = TypeVar("M", bound=Message)
T = TypeVar("T")


async def ask_all(
    bus: Bus, topic: RequestTopic[M, Done], message: M, *, node: int, num_stages: int, timeout_s: float
) -> dict[int, str]:
    """Send `message` to every stage of the node at once; returns why some did not do it, by stage."""

    async def ask(stage: int) -> str:
        try:
            await bus.request(topic.at(node=node, stage=stage), message, timeout_s=timeout_s)
        except BusError as error:
            return str(error)
        return ""

    reasons = await asyncio.gather(*(ask(stage) for stage in range(num_stages)))
    return {stage: reason for stage, reason in enumerate(reasons) if reason}


async def on_disk(work: Callable[[], T]) -> T:
    """Run blocking work in a thread; a cancellation waits until it has come to its end.

    A thread cannot be stopped: without the wait a checkpoint could appear after its trainer has gone.
    """
    thread = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        await asyncio.wait([thread])
        raise
