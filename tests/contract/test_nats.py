"""What only a real server can do to us: be absent, go away, and come back."""

import asyncio
import contextlib
import os
import signal
from pathlib import Path
from urllib.parse import ParseResult

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.transport import TcpTransport
from nats.errors import NoRespondersError
from nats.errors import TimeoutError as NatsTimeoutError

from lemix.nats_server import NatsServer
from shared.bus.base import Incoming, StreamSpec
from shared.bus.nats import NatsBus
from shared.errors import BusError, BusTimeoutError
from shared.messages.inference import CancelTask, Placed
from shared.subjects import RequestSubject, Subject
from tests.contract.streams import taken

CANCEL = Subject("test.cancel", CancelTask)
ASK = RequestSubject("test.ask", CancelTask, Placed)


async def crash_and_restart(server: NatsServer) -> None:
    os.kill(server.pid, signal.SIGKILL)
    await server.stop()
    await server.start()


async def answered(bus: NatsBus) -> Placed:
    """Ask until the answer comes: requests are lost while the other side is still away."""
    while True:
        try:
            return await bus.request(ASK, CancelTask(task_id="t"), timeout_s=0.5)
        except BusError:
            continue


async def stored(bus: NatsBus, body: bytes) -> None:
    """Publish until it is known to be stored: the id makes the repetition harmless."""
    while True:
        try:
            await bus.publish_durable("test.stored", body, message_id=body.decode())
            return
        except BusTimeoutError:
            continue


async def test_the_bus_survives_a_crash_of_the_server(nats_server: NatsServer) -> None:
    one = await NatsBus.connect(nats_server.url, name="one")
    other = await NatsBus.connect(nats_server.url, name="other")
    got: asyncio.Queue[str] = asyncio.Queue()

    async def handle(incoming: Incoming[CancelTask]) -> None:
        await got.put(incoming.message.task_id)

    async def respond(incoming: Incoming[CancelTask]) -> Placed:
        return Placed(node=3)

    await other.respond(ASK, respond)
    await other.subscribe(CANCEL, handle)
    await crash_and_restart(nats_server)
    assert await answered(one) == Placed(node=3)
    await one.publish(CANCEL, CancelTask(task_id="after"))
    assert await got.get() == "after"
    await one.close()
    await other.close()


class AnsweringClient:
    """nats-py's client as far as a request goes."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()

    def jetstream(self, timeout: float) -> None:
        """There are no streams."""

    async def request(self, subject: str, payload: bytes, *, timeout: float, headers: object) -> Msg:
        return await asyncio.wait_for(self.answer, timeout)


@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancellation_that_comes_with_the_answer_is_not_lost(fails: bool) -> None:
    client = AnsweringClient()
    bus = NatsBus(client, "")
    bus.max_message_bytes = 1000
    asking = asyncio.create_task(bus.request(ASK, CancelTask(task_id="t"), timeout_s=5))
    await asyncio.sleep(0)
    if fails:
        client.answer.set_exception(NoRespondersError())
    else:
        client.answer.set_result(Msg(client, data=Placed(node=0).pack()))
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking


async def test_a_reader_goes_on_where_it_was_when_the_server_crashed(nats_server: NatsServer) -> None:
    bus = await NatsBus.connect(nats_server.url, name="trainer")
    await bus.ensure_stream(StreamSpec("TEST", ("test.stored",)))
    for body in (b"1", b"2", b"3"):
        await bus.publish_durable("test.stored", body)
    reader = await bus.read_stream("TEST", reader="trainer", after_sequence=0)
    assert [m.body for m in await taken(reader, 1)] == [b"1"]
    fence = await bus.next_fence("trainer")

    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(taken(reader, 2))
        await crash_and_restart(nats_server)
    assert [m.sequence for m in waiting.result()] == [2, 3]

    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(taken(reader, 1))
        await crash_and_restart(nats_server)
        await stored(bus, b"4")
    assert [m.body for m in waiting.result()] == [b"4"]
    assert await bus.next_fence("trainer") > fence
    await bus.close()


async def test_closing_while_the_server_is_away_is_bounded(nats_server: NatsServer) -> None:
    bus = await NatsBus.connect(nats_server.url, name="one")
    await nats_server.stop()
    async with asyncio.timeout(3):
        await bus.close()


async def test_a_server_that_is_not_there_is_an_error_that_names_the_place(nats_server: NatsServer) -> None:
    await nats_server.stop()
    with pytest.raises(BusError, match=nats_server.url.removeprefix("nats://")):
        await NatsBus.connect(nats_server.url, name="one", timeout_s=0.2)


class LostConsumer:
    """JetStream as a reader needs it. Asked for the consumer, it fails when it is cancelled, once."""

    def __init__(self) -> None:
        self.num_asked = 0

    async def consumers_info(self, stream: str) -> list[object]:
        return []

    async def add_consumer(self, stream: str, config: object) -> None:
        """There is one."""

    async def pull_subscribe_bind(self, consumer: str, stream: str) -> None:
        """Nothing is ever fetched."""

    async def consumer_info(self, stream: str, consumer: str) -> None:
        self.num_asked += 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if self.num_asked > 1:
                raise
        raise NatsTimeoutError


class ReconnectingClient:
    """nats-py's client as far as a reader goes."""

    def __init__(self) -> None:
        self.stats = {"reconnects": 0}

    def jetstream(self, timeout: float) -> LostConsumer:
        return LostConsumer()


async def test_a_reader_that_is_cancelled_when_the_server_does_not_answer_ends() -> None:
    client = ReconnectingClient()
    reader = await NatsBus(client, "").read_stream("TEST", reader="trainer", after_sequence=0)
    client.stats["reconnects"] += 1
    reading = asyncio.create_task(reader.next(timeout_s=60))
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.wait({reading}, timeout=3)
    assert reading.cancelled()


class RefusingTransport(TcpTransport):
    """Refuses in the moment in which an attempt is cancelled, as asyncio.wait_for can until Python 3.12."""

    def __init__(self, attempts: list[str]) -> None:
        self._attempts = attempts

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:
        self._attempts.append(uri.netloc)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        raise ConnectionRefusedError


class SlowClient(Client):
    """Is connected in the moment in which the attempt is cancelled."""

    async def connect(self, *_args: object, **_options: object) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()


async def test_a_connection_that_comes_with_a_cancellation_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    clients: list[SlowClient] = []

    def new_client() -> SlowClient:
        clients.append(SlowClient())
        return clients[-1]

    monkeypatch.setattr("shared.bus.nats.Client", new_client)
    connecting = asyncio.create_task(NatsBus.connect("nats://127.0.0.1:9", name="one"))
    await asyncio.sleep(0)
    connecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connecting
    assert clients[0].is_closed


async def test_a_refusal_that_comes_with_the_deadline_ends_the_attempts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attempts: list[str] = []
    monkeypatch.setattr("nats.aio.client.TcpTransport", lambda: RefusingTransport(attempts))
    with pytest.raises(BusError, match=r"no connection to NATS at 127\.0\.0\.1:9"):
        await NatsBus.connect("nats://127.0.0.1:9", name="one", timeout_s=0.05)
    assert attempts == ["127.0.0.1:9"]


async def test_a_user_and_a_password_of_an_address_are_decoded(tmp_path: Path) -> None:
    config = tmp_path / "nats.conf"
    config.write_text('authorization { user: u, password: "p@ss" }\n')
    async with NatsServer(tmp_path / "nats", config=config) as server:
        bus = await NatsBus.connect(f"nats://u:p%40ss@127.0.0.1:{server.port}", name="one")
        assert await bus.answers()
        await bus.close()
        with pytest.raises(BusError):
            await NatsBus.connect(f"nats://u:p%40s@127.0.0.1:{server.port}", name="one", timeout_s=1)


async def test_of_several_servers_one_that_answers_will_do(nats_server: NatsServer) -> None:
    bus = await NatsBus.connect(f"nats://127.0.0.1:1,{nats_server.url}", name="one")
    assert await bus.answers()
    await bus.close()


async def test_a_server_that_has_gone_does_not_answer(tmp_path: Path) -> None:
    async with NatsServer(tmp_path / "nats") as server:
        bus = await NatsBus.connect(server.url, name="one")
        await server.stop()
        assert not await bus.answers()
        await bus.close()


async def test_a_store_that_is_too_small_says_what_is_needed(tmp_path: Path) -> None:
    config = tmp_path / "nats.conf"
    config.write_text("jetstream { max_file_store: 1MB }\n")
    async with NatsServer(tmp_path / "nats", config=config) as server:
        bus = await NatsBus.connect(server.url, name="one")
        with pytest.raises(BusError, match=r"stream BIG needs 1 GiB.*max_file_store"):
            await bus.ensure_stream(StreamSpec("BIG", ("test.big",)))
        await bus.close()
