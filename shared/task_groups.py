"""Tasks that handlers start in the group of their service."""

import asyncio
from collections.abc import Coroutine


def start_unless_ending(group: asyncio.TaskGroup, work: Coroutine[object, object, None]) -> None:
    """Run `work` in the group. A group that ends begins nothing new: then `work` is dropped.

    Messages still come while a service stops, and a coroutine that no group takes would be left behind.
    """
    try:
        group.create_task(work)
    except RuntimeError:  # what a group raises that was cancelled, or is over
        work.close()
