"""An attacker who has the key of one role: against a real server, all that is not its own is refused."""

import asyncio
import itertools
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from lemix.nats_server import NatsServer
from lemix.nats_users import make_users
from services.trainer.streams import REJECTED_STREAM, TRAIN_STREAM
from shared import subjects
from shared.bus.access import access_of
from shared.bus.base import Incoming
from shared.bus.nats import NatsBus
from shared.bus.permissions import USERS, Role, User
from shared.errors import NotAllowedError
from shared.messages.inference import InferenceTask, Placed, Sampling, TokensProduced
from shared.messages.weights import RollBackWeights
from shared.settings import LemixSettings
from tests.support.nats_clients import client_of

ALL_USERS = (*USERS, User("second", Role.GATEWAY))
PLACES = {
    "node": ["0"],
    "stage": ["0", "1"],
    "gateway": ["gateway.1", "second.1", "trainer.1"],
}
STREAMS = ("LEMIX_TRAIN", "LEMIX_REJECTED", "KV_lemix-fences")
STREAM_CALLS = (
    *("STREAM.CREATE", "STREAM.UPDATE", "STREAM.INFO", "STREAM.DELETE", "STREAM.PURGE", "STREAM.MSG.GET"),
    *("STREAM.MSG.DELETE", "STREAM.SNAPSHOT", "STREAM.RESTORE", "STREAM.PEER.REMOVE"),
    *("STREAM.LEADER.STEPDOWN", "CONSUMER.CREATE", "CONSUMER.NAMES", "CONSUMER.LIST", "DIRECT.GET"),
)
CONSUMER_CALLS = (
    *("CREATE", "DURABLE.CREATE", "INFO", "DELETE", "PAUSE", "RESET", "UNPIN", "LEADER.STEPDOWN", "MSG.NEXT"),
)
GENERAL_CALLS = (
    *("INFO", "STREAM.NAMES", "STREAM.LIST", "META.LEADER.STEPDOWN", "SERVER.REMOVE", "ACCOUNT.PURGE.x"),
)
ELSEWHERE = (
    *("lemix.unknown", "anything", "$SYS.REQ.SERVER.PING", "$SYS.REQ.USER.INFO", "$SRV.PING"),
    *("$KV.other.key", "$JS.EVENT.ADVISORY.API", "$JS.API.CONSUMER.CREATE.LEMIX_TRAIN.c.lemix.train.batches"),
    *(f"$JS.API.DIRECT.GET.KV_lemix-fences.$KV.lemix-fences.{key}" for key in ("trainer", "0")),
)
WILDCARDS = (
    *(">", "*", "lemix.>", "lemix.*.*", "lemix.gateway.>", "lemix.gateway.*.*.tokens", "lemix.node.>"),
    *("lemix.node.*.*", "lemix.train.*", "_INBOX.>", "_INBOX.*.*", "$JS.>", "$KV.>", "$SYS.>"),
)

STAGE_ORDERS = "restore save merge reduce keep release"
TO_STAGES = "iteration forward check backward step tied link rendezvous"
MAY_SEND = {
    "gateway": "task.submit node.0.cancel weights.nodes cluster.status",
    "second": "task.submit node.0.cancel weights.nodes cluster.status",
    "scheduler": "node.0.assign gateway.gateway.1.failed gateway.second.1.failed gateway.trainer.1.failed",
    "stage_worker": (
        "task.ended node.0.sampled node.0.trained node.0.heartbeat train.report cluster.heartbeat "
        "cluster.progress cluster.stopped "
        + " ".join(f"gateway.{each}.tokens gateway.{each}.failed" for each in PLACES["gateway"])
        + " node.0.stage.0.iteration node.0.stage.0.backward node.0.stage.0.tied node.0.stage.0.link "
        "node.0.stage.0.rendezvous " + " ".join(f"node.0.stage.1.{each}" for each in TO_STAGES.split())
    ),
    "trainer": (
        "task.place task.ended train.progress train.rejected node.0.assign node.0.cancel node.0.step_ahead "
        "node.0.publish node.0.stage.0.forward node.0.stage.0.check node.0.stage.0.step "
        + " ".join(f"node.0.stage.{stage}.{each}" for stage in "01" for each in STAGE_ORDERS.split())
    ),
    "ingest": "train.batches train.check train.status weights.nodes cluster.status",
    "operator": (
        "weights.durable weights.rollback weights.lineage weights.lineage.entry weights.nodes cluster.status"
    ),
}
"""By user, without `lemix.`"""
MAY_ANSWER = {
    "scheduler": {"gateway", "second", "trainer", "ingest", "operator"},
    "trainer": {"gateway", "second", "ingest", "operator"},
    "stage_worker": {"trainer", "stage_worker"},
}
MAY_HEAR = {
    "gateway": "gateway.gateway.1.tokens gateway.gateway.1.failed",
    "second": "gateway.second.1.tokens gateway.second.1.failed",
    "scheduler": (
        "task.submit task.place task.ended cluster.heartbeat cluster.progress cluster.stopped cluster.status"
    ),
    "stage_worker": (
        "node.0.assign node.0.cancel node.0.sampled node.0.step_ahead node.0.trained node.0.publish "
        "node.0.heartbeat "
        + " ".join(f"node.0.stage.{s}.{each}" for s in "01" for each in f"{TO_STAGES} {STAGE_ORDERS}".split())
    ),
    "trainer": (
        "gateway.trainer.1.tokens gateway.trainer.1.failed cluster.heartbeat train.report train.check "
        "train.status weights.durable weights.rollback weights.lineage weights.lineage.entry weights.nodes"
    ),
    "ingest": "train.progress",
    "operator": "",
}
JETSTREAM = {
    "trainer": {
        "$KV.lemix-fences.trainer",
        "$JS.API.STREAM.MSG.GET.KV_lemix-fences",
        "$JS.ACK.LEMIX_TRAIN.c.1.1.1.1.1",
        *(f"$JS.API.STREAM.CREATE.{stream}" for stream in STREAMS),
        *(f"$JS.API.STREAM.INFO.{stream}" for stream in STREAMS[:2]),
        "$JS.API.STREAM.PURGE.LEMIX_TRAIN",
        "$JS.API.CONSUMER.LIST.LEMIX_TRAIN",
        *(f"$JS.API.CONSUMER.{call}.LEMIX_TRAIN.c" for call in ("DURABLE.CREATE", "INFO", "DELETE")),
        "$JS.API.CONSUMER.MSG.NEXT.LEMIX_TRAIN.c",
    },
    "stage_worker": {"$JS.API.STREAM.MSG.GET.KV_lemix-fences"},
    "operator": {"$JS.API.STREAM.MSG.GET.LEMIX_REJECTED"},
}


TASK = InferenceTask(
    task_id="t", gateway="gateway.1", prompt=(1,), sampling=Sampling(max_tokens=1), timeout_s=1.0
)


def protocol() -> Iterator[str]:
    """Every subject of the protocol, at a few places."""
    for topic in vars(subjects).values():
        if isinstance(topic, subjects.Topic | subjects.RequestTopic):
            places = [PLACES[place] for place in re.findall(r"{(\w+)}", topic.pattern)]
            for chosen in itertools.product(*places):
                yield re.sub(r"{\w+}", "{}", topic.pattern).format(*chosen)
    yield from (subjects.BATCHES, subjects.REJECTED)


def jetstream() -> Iterator[str]:
    """Every call of JetStream's API, and what else it listens to."""
    for stream in STREAMS:
        yield from (f"$JS.API.{call}.{stream}" for call in STREAM_CALLS)
        yield from (f"$JS.API.CONSUMER.{call}.{stream}.c" for call in CONSUMER_CALLS)
        yield f"$JS.ACK.{stream}.c.1.1.1.1.1"
    yield from (f"$JS.API.{call}" for call in GENERAL_CALLS)
    yield "$KV.lemix-fences.trainer"


INBOXES = {user.name: f"_INBOX.{user.name}.x" for user in ALL_USERS}
EVERYTHING = [*protocol(), *jetstream(), *INBOXES.values(), *ELSEWHERE]


def sent_by(user: str) -> set[str]:
    """All that this user may send."""
    plain = {f"lemix.{each}" for each in MAY_SEND[user].split()}
    return plain | JETSTREAM.get(user, set()) | {INBOXES[each] for each in MAY_ANSWER.get(user, ())}


def heard_by(user: str) -> set[str]:
    """All that this user may hear."""
    return {f"lemix.{each}" for each in MAY_HEAR[user].split()} | {INBOXES[user]}


class Attacker:
    """One user's own client, of nats-py alone; it notes what the server refuses and what arrives."""

    client: Client

    def __init__(self, user: str) -> None:
        self.user = user
        self.refused: set[tuple[str, str]] = set()
        self.arrived: set[tuple[str, str]] = set()
        """Subject and sender."""

    @classmethod
    async def connect(cls, url: str, users: Path, user: User) -> "Attacker":
        attacker = cls(user.name)
        attacker.client = await client_of(url, users, user.name, attacker.on_error)
        return attacker

    async def on_error(self, error: Exception) -> None:
        found = re.search(r'permissions violation for (\w+) to "([^"]*)"', str(error))
        assert found is not None, error
        self.refused.add(found.groups())

    async def listen(self, subject: str) -> None:
        async def note(message: Msg) -> None:
            if not message.headers:  # answers of JetStream arrive in inboxes as well
                self.arrived.add((message.subject, message.data.decode()))

        await self.client.subscribe(subject, cb=note)

    def refusals(self, kind: str) -> set[str]:
        return {subject for refused, subject in self.refused if refused == kind}


class Locked:
    """A server with locks, its streams there, and where its users' keys are."""

    def __init__(self, url: str, users: Path) -> None:
        self.url = url
        self.users = users

    def of(self, users: Path) -> "Locked":
        """The same server, with other users' keys."""
        return Locked(self.url, users)

    async def bus(self, role: Role) -> NatsBus:
        settings = LemixSettings.given(nats_url=self.url, nats_users=self.users)
        return await NatsBus.connect(self.url, name=role, access=access_of(settings, role))


@pytest.fixture
async def locked(tmp_path: Path) -> AsyncIterator[Locked]:
    config = make_users(tmp_path / "users", ALL_USERS)
    async with NatsServer(tmp_path / "nats", config=config) as server:
        locked = Locked(server.url, tmp_path / "users")
        trainer = await locked.bus(Role.TRAINER)
        for stream in (TRAIN_STREAM, REJECTED_STREAM):
            await trainer.ensure_stream(stream)
        await trainer.next_fence("trainer")
        await trainer.close()
        yield locked


async def test_each_user_sends_and_hears_its_own_and_nothing_else(locked: Locked) -> None:
    async with AsyncExitStack() as stack:
        attackers = [await Attacker.connect(locked.url, locked.users, user) for user in ALL_USERS]
        for attacker in attackers:
            stack.push_async_callback(attacker.client.close)
            for subject in (*EVERYTHING, *WILDCARDS):
                await attacker.listen(subject)
        for attacker in attackers:
            await attacker.client.flush()
        for attacker in attackers:
            for subject in EVERYTHING:
                await attacker.client.publish(subject, attacker.user.encode())
        for attacker in (*attackers, *attackers):  # sent by all first, then heard by all
            await attacker.client.flush()

    lower = {subject.lower() for subject in EVERYTHING}
    assert len(lower) == len(EVERYTHING)
    for attacker in attackers:
        user = attacker.user
        assert {each.lower() for each in sent_by(user) | heard_by(user)} <= lower
        assert lower - attacker.refusals("publish") == {each.lower() for each in sent_by(user)}, user
        allowed = (lower | {each.lower() for each in WILDCARDS}) - attacker.refusals("subscription")
        assert allowed == {each.lower() for each in heard_by(user)}, user
        assert attacker.arrived == {
            (subject, each.user)
            for subject in heard_by(user)
            for each in attackers
            if subject in sent_by(each.user)
        }, user


async def test_no_command_is_sent_by_naming_it_as_the_place_for_an_answer(locked: Locked) -> None:
    scheduler, gateway = await locked.bus(Role.SCHEDULER), await locked.bus(Role.GATEWAY)
    stage = await Attacker.connect(locked.url, locked.users, User("stage_worker", Role.STAGE))
    attacker = await Attacker.connect(locked.url, locked.users, User("gateway", Role.GATEWAY))
    restore = subjects.RESTORE.at(node=0, stage=0).name
    asked = asyncio.Event()

    async def place(incoming: Incoming[InferenceTask]) -> Placed:
        asked.set()
        return Placed(node=0)

    await scheduler.respond(subjects.SUBMIT.at(), place)
    await stage.listen(restore)
    await stage.client.flush()
    await attacker.client.publish(subjects.SUBMIT.at().name, TASK.pack(), reply=restore)
    await attacker.client.flush()
    await asked.wait()
    # Answered after the first one, and by the same connection.
    assert await gateway.request(subjects.SUBMIT.at(), TASK, timeout_s=5) == Placed(node=0)
    await stage.client.flush()
    assert stage.arrived == set()
    for each in (scheduler, gateway, stage.client, attacker.client):
        await each.close()


async def test_what_the_server_refuses_fails_the_call_and_not_its_deadline(locked: Locked) -> None:
    gateway = await locked.bus(Role.GATEWAY)

    async def hear(incoming: Incoming[TokensProduced]) -> None:
        raise AssertionError

    async with asyncio.timeout(30):
        for what, call in {
            "send lemix.weights.rollback": gateway.request(
                subjects.ROLLBACK.at(), RollBackWeights(version=0), timeout_s=600
            ),
            "send lemix.train.batches": gateway.publish_durable(subjects.BATCHES, b"{}"),
            "hear lemix.gateway.second.1.tokens": gateway.subscribe(
                subjects.TOKENS.at(gateway="second.1"), hear
            ),
            "send $js.api.stream.create.lemix_train": gateway.ensure_stream(TRAIN_STREAM),
            "send $js.api.stream.purge.lemix_train": gateway.purge_stream(TRAIN_STREAM.name, 1),
            "send $js.api.consumer.list.lemix_train": gateway.read_stream(
                TRAIN_STREAM.name, reader="trainer", after_sequence=0
            ),
            "send $js.api.stream.msg.get.lemix_train": gateway.read_stored(
                TRAIN_STREAM.name, after_sequence=0
            ),
            "send $js.api.stream.create.kv_lemix-fences": gateway.next_fence("trainer"),
        }.items():
            with pytest.raises(NotAllowedError, match=re.escape(f"the NATS user 'gateway' may not {what}")):
                await call
    await gateway.close()


async def test_a_call_that_is_allowed_goes_on_while_another_is_refused(locked: Locked) -> None:
    gateway, scheduler = await locked.bus(Role.GATEWAY), await locked.bus(Role.SCHEDULER)
    may_answer = asyncio.Event()

    async def place(incoming: Incoming[InferenceTask]) -> Placed:
        await may_answer.wait()
        return Placed(node=0)

    await scheduler.respond(subjects.SUBMIT.at(), place)
    async with asyncio.TaskGroup() as tasks:
        placed = tasks.create_task(gateway.request(subjects.SUBMIT.at(), TASK, timeout_s=30))
        with pytest.raises(NotAllowedError):
            await gateway.publish_durable(subjects.BATCHES, b"{}")
        may_answer.set()
    assert placed.result() == Placed(node=0)
    await gateway.close()
    await scheduler.close()


async def test_who_is_not_known_is_told_at_once_and_why(locked: Locked, tmp_path: Path) -> None:
    make_users(tmp_path / "others")
    stranger = locked.of(tmp_path / "others")
    async with asyncio.timeout(5):
        with pytest.raises(NotAllowedError, match=r"the server does not know the user 'trainer' of .*others"):
            await stranger.bus(Role.TRAINER)
        with pytest.raises(NotAllowedError, match="LEMIX_NATS_USERS"):
            await NatsBus.connect(locked.url, name="trainer")


async def test_a_server_without_locks_lets_in_a_user_it_does_not_know(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    make_users(tmp_path / "users")
    bus = await Locked(nats_server.url, tmp_path / "users").bus(Role.TRAINER)
    assert await bus.next_fence("trainer") == 1
    await bus.close()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("nobody", "cannot read the NATS user in"),
        ("gateway", "the NATS user 'gateway' may not hear lemix.cluster.heartbeat"),
    ],
)
async def test_a_service_with_another_role_or_none_ends_and_says_so(
    locked: Locked, tmp_path: Path, given: str, reason: str
) -> None:
    users = tmp_path / "mounted"
    if given != "nobody":
        users.mkdir()
        shutil.copytree(locked.users / given, users / "scheduler")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.scheduler"),
        env=os.environ
        | {
            "LEMIX_NATS_URL": locked.url,
            "LEMIX_NATS_USERS": str(users),
            "LEMIX_RUN_DIR": str(tmp_path / "run"),
        },
        stderr=asyncio.subprocess.PIPE,
    )
    _, complaints = await process.communicate()
    assert process.returncode == 1
    assert reason in complaints.decode()
    assert "Traceback" not in complaints.decode()
