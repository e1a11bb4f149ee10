"""The bus of a process with several stages: what stays in it, what leaves it, and in which order."""

import asyncio

import pytest

from shared.bus import near
from shared.bus.base import Incoming
from shared.bus.memory import MemoryBroker
from shared.bus.near import NearBus
from shared.errors import BusError, NoResponderError
from shared.messages.base import Message
from shared.messages.inference import CancelTask, Placed
from shared.subjects import RequestSubject, Subject

HERE = Subject("test.here", CancelTask)
ELSEWHERE = Subject("test.elsewhere", CancelTask)
EVERYWHERE = Subject("test.everywhere", CancelTask)
ASK = RequestSubject("test.ask", CancelTask, Placed)


class Arrived:
    """The messages that a handler has got, and a way to wait for them."""

    def __init__(self) -> None:
        self.messages: list[CancelTask] = []
        self._changed = asyncio.Condition()

    async def __call__(self, incoming: Incoming[CancelTask]) -> None:
        async with self._changed:
            self.messages.append(incoming.message)
            self._changed.notify_all()

    async def count(self, number: int) -> list[str]:
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.messages) >= number)
        return [message.task_id for message in self.messages]


class Wire:
    """The far world, and the subjects of all that went through it."""

    def __init__(self) -> None:
        self.carried: list[str] = []
        self._broker = MemoryBroker(observe=self._note)

    def _note(self, subject: str, message: Message, now_s: float) -> None:
        self.carried.append(subject)

    def process(self, *heard_elsewhere: str) -> NearBus:
        return NearBus(self._broker.connect(), heard_elsewhere=heard_elsewhere)


def task(name: str) -> CancelTask:
    return CancelTask(task_id=name)


async def test_a_message_to_a_listener_here_arrives_as_it_is_and_does_not_leave() -> None:
    wire, arrived, sent = Wire(), Arrived(), task("a")
    bus = wire.process()
    await bus.subscribe(HERE, arrived)
    await bus.publish(HERE, sent)
    assert await arrived.count(1) == ["a"]
    assert arrived.messages[0] is sent
    assert wire.carried == []


async def test_a_message_from_another_process_reaches_the_same_listener() -> None:
    wire, arrived = Wire(), Arrived()
    bus, other = wire.process(), wire.process()
    await bus.subscribe(HERE, arrived)
    await other.publish(HERE, task("far"))
    assert await arrived.count(1) == ["far"]
    await bus.publish(HERE, task("near"))
    assert await arrived.count(2) == ["far", "near"]
    assert wire.carried == [HERE.name]


async def test_a_message_that_nobody_here_listens_to_leaves() -> None:
    wire, arrived = Wire(), Arrived()
    bus, other = wire.process(), wire.process()
    await other.subscribe(ELSEWHERE, arrived)
    await bus.publish(ELSEWHERE, task("a"))
    assert await arrived.count(1) == ["a"]


async def test_what_is_heard_elsewhere_too_reaches_everyone_once() -> None:
    wire, here, also_here, there = Wire(), Arrived(), Arrived(), Arrived()
    bus, other = wire.process(EVERYWHERE.name), wire.process(EVERYWHERE.name)
    for listening, arrived in ((bus, here), (bus, also_here), (other, there)):
        await listening.subscribe(EVERYWHERE, arrived)
    for name in ("a", "b"):
        await bus.publish(EVERYWHERE, task(name))
    for arrived in (here, also_here, there):
        assert await arrived.count(2) == ["a", "b"]


async def test_the_handler_never_runs_twice_at_once_wherever_messages_come_from() -> None:
    wire, running, most, ended = Wire(), 0, 0, asyncio.Semaphore(0)
    bus, other = wire.process(), wire.process()

    async def handler(incoming: Incoming[CancelTask]) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        ended.release()

    await bus.subscribe(HERE, handler)
    for number in range(4):
        await (bus if number % 2 else other).publish(HERE, task(str(number)))
    for _ in range(4):
        await ended.acquire()
    assert most == 1


async def test_requests_are_answered_here_or_there() -> None:
    async def place(incoming: Incoming[CancelTask]) -> Placed:
        return Placed(node=7)

    wire = Wire()
    bus, other = wire.process(), wire.process()
    with pytest.raises(NoResponderError):
        await bus.request(ASK, task("a"), timeout_s=5)
    await bus.respond(ASK, place)
    wire.carried.clear()
    assert await bus.request(ASK, task("a"), timeout_s=5) == Placed(node=7)
    assert wire.carried == []
    assert await other.request(ASK, task("a"), timeout_s=5) == Placed(node=7)


async def test_after_the_last_listener_here_messages_leave_again() -> None:
    wire, arrived = Wire(), Arrived()
    bus = wire.process()
    subscription = await bus.subscribe(HERE, arrived)
    await subscription.unsubscribe()
    await bus.publish(HERE, task("a"))
    assert wire.carried == [HERE.name]


async def test_a_handler_that_raises_here_fails_the_bus() -> None:
    async def handler(incoming: Incoming[CancelTask]) -> None:
        raise BusError("of the handler")

    bus = Wire().process()
    await bus.subscribe(HERE, handler)
    await bus.publish(HERE, task("a"))
    with pytest.raises(BusError, match="of the handler"):
        await bus.wait_failed()


async def test_a_handler_that_cannot_keep_up_fails_the_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "MAX_WAITING", 2)
    bus, arrived = Wire().process(), Arrived()
    await bus.subscribe(HERE, arrived)
    for _ in range(3):  # none of them is handled before this task waits
        await bus.publish(HERE, task("a"))
    with pytest.raises(BusError, match="faster than they were handled"):
        await bus.wait_failed()
