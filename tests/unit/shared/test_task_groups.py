"""A coroutine that comes to a group: it runs, or is dropped without a trace."""

import asyncio
import gc
import warnings

from shared.task_groups import start_unless_ending


def test_a_living_group_runs_it() -> None:
    done: list[str] = []

    async def work() -> None:
        done.append("done")

    async def case() -> None:
        async with asyncio.TaskGroup() as group:
            start_unless_ending(group, work())

    asyncio.run(case())
    assert done == ["done"]


def test_a_group_that_ends_drops_it_and_leaves_no_coroutine_behind() -> None:
    done: list[str] = []

    async def work() -> None:
        done.append("done")

    async def start_when_cancelled(group: asyncio.TaskGroup) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            start_unless_ending(group, work())

    async def case() -> None:
        async with asyncio.TaskGroup() as group:
            cancelled = group.create_task(start_when_cancelled(group))
            await asyncio.sleep(0)
            ending = asyncio.current_task()
            assert ending is not None and not cancelled.done()
            ending.cancel()

    async def cancelled() -> None:
        task = asyncio.create_task(case())
        await asyncio.wait([task])
        assert task.cancelled()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asyncio.run(cancelled())
        gc.collect()
    assert done == []
    assert [str(warning.message) for warning in caught] == []
