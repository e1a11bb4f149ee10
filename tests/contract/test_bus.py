"""What services may rely on, whatever bus carries their messages."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from shared.bus.base import Bus, Handler, Incoming, Lease, Stored, StoredMessage, StreamSpec, StreamState
from shared.errors import (
    BusError,
    BusTimeoutError,
    MalformedMessageError,
    MessageTooLargeError,
    NoResponderError,
    RefusedError,
)
from shared.messages.base import Done
from shared.messages.inference import CancelTask, Placed, TaskFailed
from shared.subjects import RequestSubject, Subject
from tests.contract.streams import taken

Connect = Callable[[], Awaitable[Bus]]

CANCEL = Subject("test.cancel", CancelTask)
NOT_A_CANCEL = Subject("test.cancel", TaskFailed)
ASK = RequestSubject("test.ask", CancelTask, Placed)
NOT_AN_ASK = RequestSubject("test.ask", Done, Placed)
STREAM = StreamSpec("TEST", ("test.stored",), max_bytes=4096)
TRACE = f"00-{'1' * 32}-{'2' * 16}-01"


class Inbox:
    """A handler that keeps what it gets."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Incoming[CancelTask]] = asyncio.Queue()

    async def __call__(self, incoming: Incoming[CancelTask]) -> None:
        await self.queue.put(incoming)

    async def ids(self, count: int) -> list[str]:
        return [(await self.queue.get()).message.task_id for _ in range(count)]


def cancel(task_id: object) -> CancelTask:
    return CancelTask(task_id=str(task_id))


async def place_on_7(incoming: Incoming[CancelTask]) -> Placed:
    return Placed(node=7)


async def test_messages_arrive_at_every_subscriber_in_order(connect: Connect) -> None:
    sender, one, other = await connect(), await connect(), await connect()
    inboxes = Inbox(), Inbox()
    for bus, inbox in zip((one, other), inboxes, strict=True):
        await bus.subscribe(CANCEL, inbox)
    for i in range(100):
        await sender.publish(CANCEL, cancel(i))
    for inbox in inboxes:
        assert await inbox.ids(100) == [str(i) for i in range(100)]


async def test_a_handler_gets_the_next_message_after_it_has_returned(connect: Connect) -> None:
    bus = await connect()
    first_may_return, log, done = asyncio.Event(), list[str](), asyncio.Event()

    async def handle(incoming: Incoming[CancelTask]) -> None:
        log.append(f"enter {incoming.message.task_id}")
        await first_may_return.wait()
        log.append(f"leave {incoming.message.task_id}")
        if incoming.message.task_id == "1":
            done.set()

    await bus.subscribe(CANCEL, handle)
    for i in range(2):
        await bus.publish(CANCEL, cancel(i))
    first_may_return.set()
    await done.wait()
    assert log == ["enter 0", "leave 0", "enter 1", "leave 1"]


async def test_members_of_a_queue_share_the_messages(connect: Connect) -> None:
    sender, one, other = await connect(), await connect(), await connect()
    inbox, seen_by = Inbox(), set[str]()

    def member(name: str) -> Handler[CancelTask]:
        async def handle(incoming: Incoming[CancelTask]) -> None:
            seen_by.add(name)
            await inbox(incoming)

        return handle

    await one.subscribe(CANCEL, member("one"), queue="q")
    await other.subscribe(CANCEL, member("other"), queue="q")
    for i in range(100):
        await sender.publish(CANCEL, cancel(i))
    assert sorted(await inbox.ids(100), key=int) == [str(i) for i in range(100)]
    assert seen_by == {"one", "other"}
    assert inbox.queue.empty()


async def test_nothing_arrives_after_unsubscribing(connect: Connect) -> None:
    bus = await connect()
    gone, inbox = Inbox(), Inbox()
    subscription = await bus.subscribe(CANCEL, gone)
    await bus.subscribe(CANCEL, inbox)
    await subscription.unsubscribe()
    await subscription.unsubscribe()
    await bus.publish(CANCEL, cancel(1))
    await inbox.ids(1)
    assert gone.queue.empty()


async def test_a_request_is_answered(connect: Connect) -> None:
    asker, answerer = await connect(), await connect()
    await answerer.respond(ASK, place_on_7)
    assert await asker.request(ASK, cancel(1), timeout_s=5) == Placed(node=7)


@pytest.mark.parametrize(("options", "limit"), [({}, 64), ({"max_running": 70}, 70)])
async def test_requests_run_concurrently_and_at_most_so_many_at_once(
    connect: Connect, options: dict[str, int], limit: int
) -> None:
    asker, answerer = await connect(), await connect()
    running, full, may_return = set[str](), asyncio.Event(), asyncio.Event()
    most = 0

    async def respond(incoming: Incoming[CancelTask]) -> Placed:
        nonlocal most
        running.add(incoming.message.task_id)
        most = max(most, len(running))
        if most == limit:
            full.set()
        await may_return.wait()
        running.discard(incoming.message.task_id)
        return Placed(node=0)

    await answerer.respond(ASK, respond, **options)
    async with asyncio.TaskGroup() as group:
        for i in range(80):
            group.create_task(asker.request(ASK, cancel(i), timeout_s=10))
        await full.wait()
        may_return.set()
    assert most == limit


@pytest.mark.parametrize("retry_after_s", [None, 0.25, 120.0])
async def test_a_refusal_arrives_with_reason_code_and_time(
    connect: Connect, retry_after_s: float | None
) -> None:
    asker, answerer = await connect(), await connect()

    async def refuse(incoming: Incoming[CancelTask]) -> Placed:
        raise RefusedError("no node is ready", code=503, retry_after_s=retry_after_s)

    await answerer.respond(ASK, refuse)
    with pytest.raises(RefusedError, match="no node is ready") as caught:
        await asker.request(ASK, cancel(1), timeout_s=5)
    assert (caught.value.code, caught.value.retry_after_s) == (503, retry_after_s)


async def test_a_request_that_nobody_hears_fails_at_once(connect: Connect) -> None:
    with pytest.raises(NoResponderError, match=r"test\.ask"):
        await (await connect()).request(ASK, cancel(1), timeout_s=60)


async def test_a_request_ends_at_its_deadline(connect: Connect) -> None:
    asker, answerer = await connect(), await connect()
    never = asyncio.Event()

    async def hang(incoming: Incoming[CancelTask]) -> Placed:
        await never.wait()
        return Placed(node=0)

    await answerer.respond(ASK, hang)
    with pytest.raises(BusTimeoutError, match=r"test\.ask"):
        await asker.request(ASK, cancel(1), timeout_s=0.02)


async def test_a_malformed_message_is_dropped_counted_and_not_shown(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    sender, receiver = await connect(), await connect()
    inbox = Inbox()
    await receiver.subscribe(CANCEL, inbox)
    await sender.publish(NOT_A_CANCEL, TaskFailed(task_id="t", code=500, reason="a secret"))
    await sender.publish(CANCEL, cancel("good"))
    assert await inbox.ids(1) == ["good"]
    assert receiver.num_malformed == 1
    assert "test.cancel" in caplog.text
    assert "bytes" in caplog.text
    assert "a secret" not in caplog.text


async def test_a_malformed_request_is_refused_with_400(connect: Connect) -> None:
    asker, answerer = await connect(), await connect()
    await answerer.respond(ASK, place_on_7)
    with pytest.raises(RefusedError, match="task_id") as caught:
        await asker.request(NOT_AN_ASK, Done(), timeout_s=5)
    assert caught.value.code == 400
    assert answerer.num_malformed == 1


async def test_a_malformed_answer_is_an_error_of_its_own(connect: Connect) -> None:
    asker, answerer = await connect(), await connect()

    async def answer_wrongly(incoming: Incoming[CancelTask]) -> Done:
        return Done()

    await answerer.respond(RequestSubject(ASK.name, CancelTask, Done), answer_wrongly)
    with pytest.raises(MalformedMessageError, match="Placed"):
        await asker.request(ASK, cancel(1), timeout_s=5)


async def test_an_oversize_message_fails_at_the_sender(connect: Connect) -> None:
    sender, receiver = await connect(), await connect()
    inbox = Inbox()
    await receiver.subscribe(CANCEL, inbox)
    await receiver.ensure_stream(StreamSpec("BIG", ("test.big",)))
    too_large = cancel("x" * sender.max_message_bytes)
    with pytest.raises(MessageTooLargeError, match=r"test\.cancel"):
        await sender.publish(CANCEL, too_large)
    with pytest.raises(MessageTooLargeError, match=r"test\.ask"):
        await sender.request(ASK, too_large, timeout_s=5)
    with pytest.raises(MessageTooLargeError, match=r"test\.big"):
        await sender.publish_durable("test.big", bytes(sender.max_message_bytes + 1))
    overhead = len(cancel("").pack()) + 4  # a long string's length takes four more bytes
    await sender.publish(CANCEL, cancel("x" * (sender.max_message_bytes - overhead)))
    assert len((await inbox.ids(1))[0]) == sender.max_message_bytes - overhead


async def test_a_failing_handler_fails_its_bus(connect: Connect) -> None:
    sender, receiver = await connect(), await connect()

    async def fail(incoming: Incoming[CancelTask]) -> None:
        raise KeyError("handler")

    await receiver.subscribe(CANCEL, fail)
    await sender.publish(CANCEL, cancel(1))
    with pytest.raises(KeyError, match="handler"):
        await receiver.wait_failed()


async def test_a_handler_that_ends_cancelled_fails_its_bus(connect: Connect) -> None:
    sender, receiver = await connect(), await connect()

    async def end_cancelled(incoming: Incoming[CancelTask]) -> None:
        raise asyncio.CancelledError

    await receiver.subscribe(CANCEL, end_cancelled)
    await sender.publish(CANCEL, cancel(1))
    with pytest.raises(BusError, match=r"test\.cancel"):
        await receiver.wait_failed()


async def test_a_failing_responder_fails_its_bus_and_refuses_with_500(connect: Connect) -> None:
    asker, answerer = await connect(), await connect()

    async def fail(incoming: Incoming[CancelTask]) -> Placed:
        raise KeyError("responder")

    await answerer.respond(ASK, fail)
    with pytest.raises(RefusedError) as caught:
        await asker.request(ASK, cancel(1), timeout_s=5)
    assert caught.value.code == 500
    with pytest.raises(KeyError, match="responder"):
        await answerer.wait_failed()


async def test_the_trace_travels_and_every_message_has_one(connect: Connect, process_trace: str) -> None:
    sender, receiver = await connect(), await connect()
    inbox = Inbox()
    asked_with: asyncio.Queue[str] = asyncio.Queue()

    async def respond(incoming: Incoming[CancelTask]) -> Placed:
        await asked_with.put(incoming.traceparent)
        return Placed(node=0)

    await receiver.subscribe(CANCEL, inbox)
    await receiver.respond(ASK, respond)
    for given, expected in ((TRACE, TRACE), ("", process_trace)):
        await sender.publish(CANCEL, cancel(1), traceparent=given)
        assert (await inbox.queue.get()).traceparent == expected
        await sender.request(ASK, cancel(1), timeout_s=5, traceparent=given)
        assert await asked_with.get() == expected


async def test_durable_messages_are_read_in_order_from_a_position(connect: Connect) -> None:
    writer, trainer = await connect(), await connect()
    await writer.ensure_stream(STREAM)
    for i in range(1, 6):
        assert (await writer.publish_durable("test.stored", b"%d" % i)).sequence == i
    reader = await trainer.read_stream("TEST", reader="trainer", after_sequence=2)
    messages = await taken(reader, 2)
    assert [(m.sequence, m.body) for m in messages] == [(3, b"3"), (4, b"4")]
    for message in messages:
        await message.ack()
        await message.ack()
    assert [m.sequence for m in await taken(reader, 1)] == [5]
    assert await reader.next(timeout_s=0.02) is None
    await reader.close()


async def test_what_is_stored_can_be_looked_at_without_reading_the_stream(connect: Connect) -> None:
    bus, other = await connect(), await connect()
    await bus.ensure_stream(STREAM)
    for body in (b"1", b"", b"3"):
        await bus.publish_durable("test.stored", body)
    await bus.purge_stream("TEST", 1)
    looked_at = [await other.read_stored("TEST", after_sequence=sequence) for sequence in (0, 2, 3)]
    assert looked_at == [StoredMessage(2, b""), StoredMessage(3, b"3"), None]
    reader = await bus.read_stream("TEST", reader="trainer", after_sequence=0)
    assert [message.sequence for message in await taken(reader, 2)] == [2, 3]
    with pytest.raises(BusError, match="NOWHERE"):
        await other.read_stored("NOWHERE", after_sequence=0)


async def test_a_waiting_reader_gets_what_is_stored_later(connect: Connect) -> None:
    writer, trainer = await connect(), await connect()
    await writer.ensure_stream(STREAM)
    reader = await trainer.read_stream("TEST", reader="trainer", after_sequence=0)
    async with asyncio.TaskGroup() as group:
        fetched = group.create_task(taken(reader, 1))
        await writer.publish_durable("test.stored", b"later")
    assert [m.body for m in fetched.result()] == [b"later"]


async def test_a_new_reader_replaces_the_earlier_one_of_its_name(connect: Connect) -> None:
    first, second = await connect(), await connect()
    await first.ensure_stream(STREAM)
    await first.publish_durable("test.stored", b"1")
    earlier = await first.read_stream("TEST", reader="trainer", after_sequence=0)
    assert len(await taken(earlier, 1)) == 1
    later = await second.read_stream("TEST", reader="trainer", after_sequence=0)
    assert [m.body for m in await taken(later, 1)] == [b"1"]
    with pytest.raises(BusError, match="another reader"):
        await taken(earlier, 1)


async def test_headers_of_durable_messages_travel(connect: Connect, process_trace: str) -> None:
    bus = await connect()
    await bus.ensure_stream(STREAM)
    await bus.publish_durable("test.stored", b"1", headers={"traceparent": TRACE, "producer": "p1"})
    await bus.publish_durable("test.stored", b"2")
    reader = await bus.read_stream("TEST", reader="r", after_sequence=0)
    one, two = await taken(reader, 2)
    assert (one.headers["traceparent"], one.headers["producer"]) == (TRACE, "p1")
    assert two.headers["traceparent"] == process_trace


async def test_a_repeated_message_id_is_stored_once_and_told(connect: Connect) -> None:
    bus = await connect()
    await bus.ensure_stream(STREAM)
    assert await bus.publish_durable("test.stored", b"1", message_id="a") == Stored(1, is_repeat=False)
    assert await bus.publish_durable("test.stored", b"x", message_id="a") == Stored(1, is_repeat=True)
    assert await bus.publish_durable("test.stored", b"2", message_id="b") == Stored(2, is_repeat=False)


async def test_a_full_stream_refuses(connect: Connect) -> None:
    bus = await connect()
    await bus.ensure_stream(STREAM)
    await bus.publish_durable("test.stored", bytes(2500))
    with pytest.raises(BusError):
        await bus.publish_durable("test.stored", bytes(2500))


async def test_a_stream_that_exists_is_left_as_it_is(connect: Connect) -> None:
    bus = await connect()
    await bus.ensure_stream(STREAM)
    await bus.publish_durable("test.stored", b"1")
    await bus.ensure_stream(STREAM)
    await bus.ensure_stream(StreamSpec(STREAM.name, STREAM.subjects, max_bytes=1 << 20))
    assert (await bus.publish_durable("test.stored", b"2")).sequence == 2


async def test_a_stream_tells_who_it_is_and_from_where_to_where_it_goes(connect: Connect) -> None:
    one, other = await connect(), await connect()
    first = await one.ensure_stream(STREAM)
    assert (first.first_sequence, first.last_sequence) == (1, 0)
    for _ in range(2):
        await one.publish_durable("test.stored", b"1")
    await one.purge_stream("TEST", 1)
    again = await other.ensure_stream(StreamSpec(STREAM.name, STREAM.subjects, max_bytes=1 << 20))
    assert again == StreamState(first.identity, first_sequence=2, last_sequence=2)
    await one.purge_stream("TEST", 2)
    assert await one.ensure_stream(STREAM) == StreamState(first.identity, first_sequence=3, last_sequence=2)
    assert (await other.ensure_stream(StreamSpec("OTHER", ("test.other",)))).identity != first.identity


async def test_purged_messages_make_room_and_the_others_stay_as_they_are(connect: Connect) -> None:
    bus = await connect()
    await bus.ensure_stream(STREAM)
    for size in (1500, 1500, 500):
        await bus.publish_durable("test.stored", bytes(size))
    reader = await bus.read_stream("TEST", reader="trainer", after_sequence=0)
    await bus.purge_stream("TEST", 0)
    assert [message.sequence for message in await taken(reader, 1)] == [1]
    await bus.purge_stream("TEST", 2)
    await bus.purge_stream("TEST", 1)
    assert (await bus.publish_durable("test.stored", bytes(2000))).sequence == 4
    later = await bus.read_stream("TEST", reader="trainer", after_sequence=0)
    assert [(m.sequence, len(m.body)) for m in await taken(later, 2)] == [(3, 500), (4, 2000)]
    with pytest.raises(BusError, match="NOWHERE"):
        await bus.purge_stream("NOWHERE", 1)


async def test_a_stream_may_give_up_its_oldest_messages_for_new_ones(connect: Connect) -> None:
    bus = await connect()
    await bus.ensure_stream(StreamSpec("TEST", ("test.stored",), max_bytes=4096, discard_old=True))
    for sequence in (1, 2, 3):
        assert (await bus.publish_durable("test.stored", bytes(1500))).sequence == sequence
    reader = await bus.read_stream("TEST", reader="r", after_sequence=0)
    assert (await taken(reader, 1))[0].sequence > 1


async def test_what_no_stream_takes_is_an_error(connect: Connect) -> None:
    bus = await connect()
    with pytest.raises(BusError, match=r"test\.nowhere"):
        await bus.publish_durable("test.nowhere", b"1")
    with pytest.raises(BusError, match="NOWHERE"):
        await bus.read_stream("NOWHERE", reader="r", after_sequence=0)


async def test_a_fence_is_higher_than_all_before(connect: Connect) -> None:
    one, other = await connect(), await connect()
    fences = [await bus.next_fence("trainer") for bus in (one, other, one)]
    await other.next_fence("another")
    fences.append(await other.next_fence("trainer"))
    assert fences == sorted(set(fences))


async def test_a_lease_is_written_by_who_knows_its_revision(connect: Connect) -> None:
    one, other = await connect(), await connect()
    assert await one.read_lease("trainer") is None
    taken = await one.next_fence("trainer")
    assert await other.read_lease("trainer") == Lease(taken, b"")
    await one.write_lease("trainer", b"1 to 2", revision=taken)
    written = await other.read_lease("trainer")
    assert written is not None
    assert written.body == b"1 to 2"
    assert written.revision > taken
    for stale in (taken, 1 << 40):
        with pytest.raises(BusError):
            await one.write_lease("trainer", b"forged", revision=stale)
    retaken = await other.next_fence("trainer")
    assert retaken > written.revision
    with pytest.raises(BusError):
        await one.write_lease("trainer", b"1 to 3", revision=written.revision)
    assert await one.read_lease("trainer") == Lease(retaken, b"")


async def test_closing_twice_is_harmless_and_ends_publishing(connect: Connect) -> None:
    bus = await connect()
    await bus.subscribe(CANCEL, Inbox())
    await bus.close()
    await bus.close()
    with pytest.raises(BusError):
        await bus.publish(CANCEL, cancel(1))


async def test_what_was_published_before_closing_arrives(connect: Connect) -> None:
    sender, receiver = await connect(), await connect()
    inbox = Inbox()
    await receiver.subscribe(CANCEL, inbox)
    await sender.publish(CANCEL, cancel("last"))
    await sender.close()
    assert await inbox.ids(1) == ["last"]


async def test_closing_does_not_wait_for_handlers_that_hang(connect: Connect) -> None:
    bus: Bus = await connect()
    entered, never = asyncio.Event(), asyncio.Event()

    async def hang(incoming: Incoming[CancelTask]) -> None:
        entered.set()
        await never.wait()

    await bus.subscribe(CANCEL, hang)
    await bus.publish(CANCEL, cancel(1))
    await entered.wait()
    await bus.close()
