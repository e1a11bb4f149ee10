"""Commands to all stages of a node, as the service awaits them."""

import asyncio
from typing import TypeVar

from shared.bus.base import Bus
from shared.errors import BusError
from shared.messages.base import Done, Message
from shared.subjects import RequestTopic

M = TypeVar("M", bound=Message)


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
