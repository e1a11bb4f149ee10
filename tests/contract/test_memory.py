"""What the memory bus does beyond the contract, for simulations: time on the way, losses, an onlooker."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence

import pytest

from lemix.simulation.loop import run_virtual
from shared.bus.base import Incoming
from shared.bus.memory import MemoryBroker, MemoryBus
from shared.errors import BusTimeoutError, NoResponderError, RefusedError
from shared.messages.base import Message
from shared.messages.inference import CancelTask, Placed
from shared.subjects import RequestSubject, Subject

CANCEL = Subject("test.cancel", CancelTask)
OTHER = Subject("test.other", CancelTask)
ASK = RequestSubject("test.ask", CancelTask, Placed)
HOP_S = 0.25


def cancel(task_id: object) -> CancelTask:
    return CancelTask(task_id=str(task_id))


class Log:
    """What arrived, and when."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float]] = []

    async def __call__(self, incoming: Incoming[CancelTask]) -> None:
        self.seen.append((incoming.message.task_id, asyncio.get_running_loop().time()))


async def place_on_7(incoming: Incoming[CancelTask]) -> Placed:
    return Placed(node=7)


def in_virtual_time(case: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await case()

    run_virtual(main())


def delays(*each: Sequence[float]) -> Callable[[str], Sequence[float]]:
    """One after the other, whatever the subject."""
    drawn: Iterator[Sequence[float]] = iter(each)
    return lambda subject: next(drawn)


def test_messages_take_their_time_and_keep_their_order() -> None:
    async def case() -> None:
        broker, log = MemoryBroker(carriage=lambda subject: (HOP_S,)), Log()
        sender, receiver = broker.connect(), broker.connect()
        await receiver.subscribe(CANCEL, log)
        for number in range(3):
            await sender.publish(CANCEL, cancel(number))
        await asyncio.sleep(0.1)
        await sender.publish(CANCEL, cancel(3))
        await asyncio.sleep(1.0)
        assert log.seen == [("0", HOP_S), ("1", HOP_S), ("2", HOP_S), ("3", 0.1 + HOP_S)]

    in_virtual_time(case)


def test_a_late_message_holds_up_those_behind_it_on_its_subject_only() -> None:
    async def case() -> None:
        broker, log = MemoryBroker(carriage=delays((0.5,), (0.1,), (0.1,))), Log()
        sender, receiver = broker.connect(), broker.connect()
        await receiver.subscribe(CANCEL, log)
        await receiver.subscribe(OTHER, log)
        await sender.publish(CANCEL, cancel("late"))
        await sender.publish(CANCEL, cancel("behind it"))
        await sender.publish(OTHER, cancel("elsewhere"))
        await asyncio.sleep(1.0)
        assert log.seen == [("elsewhere", 0.1), ("late", 0.5), ("behind it", 0.5)]

    in_virtual_time(case)


def test_messages_can_be_lost_and_doubled() -> None:
    async def case() -> None:
        broker, log = MemoryBroker(carriage=delays((), (0.1, 0.1))), Log()
        bus = broker.connect()
        await bus.subscribe(CANCEL, log)
        await bus.publish(CANCEL, cancel("lost"))
        await bus.publish(CANCEL, cancel("twice"))
        await asyncio.sleep(1.0)
        assert log.seen == [("twice", 0.1), ("twice", 0.1)]

    in_virtual_time(case)


def test_an_answer_travels_too_and_the_first_one_counts() -> None:
    async def case() -> None:
        broker = MemoryBroker(carriage=delays((0.1, 0.1), (0.2,), (0.4,)))
        bus = broker.connect()
        await bus.respond(ASK, place_on_7)
        assert await bus.request(ASK, cancel(1), timeout_s=5.0) == Placed(node=7)
        assert asyncio.get_running_loop().time() == pytest.approx(0.3)
        await asyncio.sleep(1.0)

    in_virtual_time(case)


def test_a_lost_answer_and_a_lost_refusal_time_out() -> None:
    async def refuse(incoming: Incoming[CancelTask]) -> Placed:
        raise RefusedError("no", code=409)

    async def case() -> None:
        broker = MemoryBroker(carriage=delays((0.1,), (), (0.1,), ()))
        bus = broker.connect()
        for responder in (place_on_7, refuse):
            subscription = await bus.respond(ASK, responder)
            with pytest.raises(BusTimeoutError):
                await bus.request(ASK, cancel(1), timeout_s=5.0)
            await subscription.unsubscribe()
        assert asyncio.get_running_loop().time() == pytest.approx(10.0)

    in_virtual_time(case)


def test_nothing_goes_out_of_or_into_a_bus_that_is_cut() -> None:
    async def case() -> None:
        broker, log = MemoryBroker(carriage=lambda subject: (HOP_S,)), Log()
        dead, alive = broker.connect(), broker.connect()
        for bus in (dead, alive):
            await bus.subscribe(CANCEL, log)
        await dead.respond(ASK, place_on_7)
        await alive.publish(CANCEL, cancel("on its way"))
        dead.cut()
        await dead.publish(CANCEL, cancel("never told"))
        with pytest.raises(NoResponderError):
            await alive.request(ASK, cancel(1), timeout_s=5.0)
        await asyncio.sleep(1.0)
        assert log.seen == [("on its way", HOP_S)], "the living one alone got it"
        await dead.close()

    in_virtual_time(case)


def test_an_observer_sees_what_is_sent_and_what_is_answered() -> None:
    seen: list[tuple[str, Message, float]] = []

    async def case() -> None:
        broker = MemoryBroker(
            carriage=lambda subject: (HOP_S,),
            observe=lambda subject, message, now_s: seen.append((subject, message, now_s)),
        )
        bus: MemoryBus = broker.connect()
        await bus.respond(ASK, place_on_7)
        await bus.publish(CANCEL, cancel("nobody listens"))
        await bus.request(ASK, cancel(1), timeout_s=5.0)

    in_virtual_time(case)
    assert seen == [
        ("test.cancel", cancel("nobody listens"), 0.0),
        ("test.ask", cancel(1), 0.0),
        ("test.ask.answer", Placed(node=7), HOP_S),
    ]


def test_sizes_go_unchecked_on_request() -> None:
    async def case() -> None:
        log = Log()
        bus = MemoryBroker(max_message_bytes=10, checks_sizes=False).connect()
        await bus.subscribe(CANCEL, log)
        await bus.publish(CANCEL, cancel("x" * 100))
        await asyncio.sleep(0.1)
        assert len(log.seen) == 1

    in_virtual_time(case)
