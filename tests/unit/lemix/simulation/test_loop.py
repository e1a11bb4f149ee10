import asyncio

import pytest

from lemix.simulation.loop import NothingToWaitForError, VirtualClock, run_virtual


def test_time_begins_at_zero_and_jumps_to_the_next_timer() -> None:
    async def main() -> list[float]:
        clock = VirtualClock(asyncio.get_running_loop())
        seen = [clock.now_s()]
        for delay_s in (86_400.0, 0.25):
            await asyncio.sleep(delay_s)
            seen.append(clock.now_s())
        return seen

    assert run_virtual(main()) == [0.0, 86_400.0, 86_400.25]


def test_sleepers_wake_in_order_of_time_then_of_falling_asleep() -> None:
    woken: list[str] = []

    async def sleeper(name: str, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        woken.append(name)

    async def main() -> None:
        names = [f"{number:02}" for number in range(20)]
        await asyncio.gather(*(sleeper(name, 1.0) for name in names), sleeper("first", 0.5))
        assert woken == ["first", *names]

    run_virtual(main())


def test_a_timeout_ends_at_its_time_and_a_timer_given_up_moves_nothing() -> None:
    async def main() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2.0):
                await asyncio.sleep(3.0)
        ended_s = loop.time()
        async with asyncio.timeout(100.0):
            await asyncio.sleep(1.0)
        await asyncio.sleep(0)
        return ended_s, loop.time()

    assert run_virtual(main()) == (2.0, 3.0)


def test_a_deadlock_is_an_error() -> None:
    async def main() -> None:
        await asyncio.sleep(7.0)
        await asyncio.Event().wait()

    with pytest.raises(NothingToWaitForError, match="at 7 s"):
        run_virtual(main())


def test_threads_are_none() -> None:
    done: list[str] = []

    def fail() -> None:
        raise OSError("no disk")

    async def main() -> None:
        thread = asyncio.get_running_loop().run_in_executor(None, done.append, "here")
        assert done == ["here"], "it ran at once"
        await thread
        with pytest.raises(OSError, match="no disk"):
            await asyncio.to_thread(fail)

    run_virtual(main())


def test_an_error_in_a_callback_ends_the_run() -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_later(1.0, {}.__getitem__, "missing")
        await asyncio.sleep(5.0)

    with pytest.raises(KeyError, match="missing"):
        run_virtual(main())
