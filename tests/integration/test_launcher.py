"""The local launcher, with stand-ins for the services."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lemix import launcher
from lemix.arenas import default_base
from lemix.bus import open_bus
from lemix.launcher import LocalCluster
from lemix.nats_server import NatsServer
from lemix.ports import claim_port
from lemix.run_folder import running_clusters
from lemix.supervision import ClusterFailedError
from lemix.topology import ClusterOptions
from shared.bus.base import Incoming
from shared.errors import ConfigurationError
from shared.messages.cluster import ClusterStatus, StatusRequest
from shared.subjects import STATUS
from tests.support.processes import is_alive, marked_with
from tests.support.waiting import until

FAKE = Path(__file__).parents[1] / "support" / "fake_service.py"


def fake_command(package: str) -> tuple[str, ...]:
    return (sys.executable, str(FAKE), package)


class Harness:
    """Clusters of stand-ins, the events they tell, and a mark on every process they start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = f"LEMIX_TEST_MARK={folder}"
        self.events: list[str] = []

    def cluster(
        self, *, start_timeout_s: float = 120.0, nats_port: int | None = None, **environment: str
    ) -> LocalCluster:
        options = ClusterOptions(
            name="run",
            runs_dir=self.folder,
            nodes=1,
            stages=2,
            stages_per_worker=1,
            start_timeout_s=start_timeout_s,
            nats_port=nats_port,
            extra_env=environment,
        )
        return LocalCluster(options, on_event=self.events.append, command_of=fake_command)

    def left_behind(self) -> list[object]:
        """Processes and shared-memory folders that should be gone."""
        folders = list(default_base().glob(f"lemix-{os.getpid()}-*"))
        return [*marked_with(self.mark).values(), *folders]


@pytest.fixture
async def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Harness]:
    monkeypatch.setenv("LEMIX_TEST_MARK", str(tmp_path))
    harness = Harness(tmp_path)
    yield harness
    assert harness.left_behind() == []


async def test_everything_starts_is_described_and_stops(harness: Harness) -> None:
    async with harness.cluster() as cluster:
        described = running_clusters(harness.folder)["run"]
        assert described.nats_url == cluster.nats_url
        assert described.api_url == cluster.api_url
        assert described.pids == cluster.pids
        assert list(described.pids) == ["scheduler", "gateway", "trainer", "node-0-stage-0", "node-0-stage-1"]
        assert all(is_alive(pid) for pid in described.pids.values())
        await until(lambda: "trainer says hello\n" in (cluster.run_dir / "logs" / "trainer.log").read_text())
    assert not any(is_alive(pid) for pid in described.pids.values())
    assert not (harness.folder / "run" / "cluster.json").exists()
    assert running_clusters(harness.folder) == {}
    assert harness.events == []


async def test_each_process_has_its_own_session_so_that_ctrl_c_reaches_only_the_launcher(
    harness: Harness,
) -> None:
    async with harness.cluster():
        started = marked_with(harness.mark)
        assert len(started) == 6
        assert all(os.getsid(pid) == pid for pid in started)


async def test_a_service_that_dies_while_starting_fails_the_start_with_its_last_words(
    harness: Harness,
) -> None:
    with pytest.raises(
        ClusterFailedError, match=r"trainer ended with status 3 while starting(?s:.*)this is why"
    ):
        await harness.cluster(FAKE_DIES="trainer", FAKE_SICK="1").start()


async def test_a_start_that_is_never_well_ends_at_its_deadline(harness: Harness) -> None:
    with pytest.raises(ClusterFailedError, match=r"health was not well within 0\.5 s"):
        await harness.cluster(start_timeout_s=0.5, FAKE_SICK="1").start()


async def test_a_failed_start_tells_its_reason_and_not_who_had_to_be_killed(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "STOP_GRACE_S", 0.0)
    with pytest.raises(ClusterFailedError, match="trainer ended with status 3 while starting"):
        await harness.cluster(FAKE_DIES="trainer", FAKE_SICK="1", FAKE_STUBBORN="stage_worker").start()
    assert harness.events == []


async def test_a_cancelled_start_leaves_nothing_behind(harness: Harness) -> None:
    start = asyncio.create_task(harness.cluster(FAKE_SICK="1").start())
    await until(lambda: len(marked_with(harness.mark)) == 6)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start


async def test_a_service_that_dies_is_started_again(harness: Harness) -> None:
    async with harness.cluster() as cluster:
        before = cluster.pids
        os.kill(before["node-0-stage-1"], signal.SIGKILL)
        await until(lambda: cluster.pids != before)
        await until(
            lambda: [found.pids for found in running_clusters(harness.folder).values()] == [cluster.pids]
        )
        changed = [name for name, pid in cluster.pids.items() if pid != before[name]]
    assert changed == ["node-0-stage-1"]
    assert len(harness.events) == 1
    assert harness.events[0].startswith("node-0-stage-1 ended with status -9; starting it again")


async def test_nats_is_started_again_on_its_port(harness: Harness) -> None:
    async with harness.cluster() as cluster:
        host, _, port = cluster.nats_url.removeprefix("nats://").partition(":")
        (ports,) = (cluster.run_dir / "nats").glob("nats-server_*.ports")
        os.kill(int(ports.stem.removeprefix("nats-server_")), signal.SIGKILL)
        await until(lambda: any("nats ended" in event for event in harness.events))
        async with asyncio.timeout(10):
            while True:
                try:
                    _, writer = await asyncio.open_connection(host, int(port))
                    break
                except ConnectionRefusedError:
                    await asyncio.sleep(0.02)
        writer.close()
        await writer.wait_closed()


async def test_nats_has_its_port_again_in_the_next_run_of_that_name(harness: Harness) -> None:
    async with harness.cluster() as cluster:
        first = cluster.nats_url
    async with harness.cluster() as cluster:
        assert cluster.nats_url == first
    taken = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", _port_of(first))
    with pytest.raises(
        ConfigurationError, match=f"{first.removeprefix('nats://')}: .*try another --nats-port"
    ):
        await harness.cluster().start()
    taken.close()
    await taken.wait_closed()


async def test_nats_listens_on_the_port_that_is_asked_for_and_keeps_it(harness: Harness) -> None:
    port = claim_port("127.0.0.1", 0)
    async with harness.cluster(nats_port=port) as cluster:
        assert _port_of(cluster.nats_url) == port
    async with harness.cluster() as cluster:
        assert _port_of(cluster.nats_url) == port


def _port_of(nats_url: str) -> int:
    return int(nats_url.rpartition(":")[2])


async def test_a_service_that_keeps_dying_ends_the_cluster(harness: Harness) -> None:
    trigger = harness.folder / "die"
    async with harness.cluster(FAKE_DIES="scheduler", FAKE_DIES_AT=str(trigger)) as cluster:
        trigger.touch()
        with pytest.raises(
            ClusterFailedError, match=r"scheduler ended with status 3, 3 restarts within 60 s are spent"
        ):
            async with asyncio.timeout(20):
                await cluster.wait_failed()
    assert len(harness.events) == 3


async def test_a_service_that_ignores_the_request_to_stop_is_killed(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "STOP_GRACE_S", 0.3)
    async with harness.cluster(FAKE_STUBBORN="stage_worker"):
        logs = [harness.folder / "run" / "logs" / f"node-0-stage-{stage}.log" for stage in range(2)]
        await until(lambda: all("hello" in log.read_text() for log in logs))
    assert sorted(harness.events) == [
        f"node-0-stage-{stage} did not stop within 0 s and was killed" for stage in range(2)
    ]


async def test_a_run_of_the_same_name_is_refused_and_the_first_goes_on(harness: Harness) -> None:
    async with harness.cluster() as cluster:
        with pytest.raises(ConfigurationError, match="'run' is already running"):
            await harness.cluster().start()
        assert list(running_clusters(harness.folder)) == ["run"]
        assert all(is_alive(pid) for pid in cluster.pids.values())


async def test_a_port_that_is_taken_is_refused(tmp_path: Path) -> None:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    cluster = LocalCluster(ClusterOptions(runs_dir=tmp_path, port=port), command_of=fake_command)
    with pytest.raises(ConfigurationError, match=f"cannot listen on 127.0.0.1:{port}"):
        await cluster.start()
    server.close()
    await server.wait_closed()


async def test_a_server_on_which_a_lemix_runs_is_refused(tmp_path: Path) -> None:
    async def answer(_: Incoming[StatusRequest]) -> ClusterStatus:
        return ClusterStatus(policy="round_robin", nodes=())

    async with NatsServer(tmp_path / "nats") as server, open_bus(server.url) as bus:
        options = ClusterOptions(runs_dir=tmp_path, nats_url=server.url)
        await bus.respond(STATUS.at(), answer)
        with pytest.raises(ConfigurationError, match=f"already running on 127.0.0.1:{server.port}"):
            await LocalCluster(options, command_of=fake_command).start()


async def test_a_given_server_is_used_and_outlives_the_cluster(tmp_path: Path) -> None:
    async with NatsServer(tmp_path / "nats") as server:
        options = ClusterOptions(name="run", runs_dir=tmp_path, nodes=1, stages=1, nats_url=server.url)
        async with LocalCluster(options, command_of=fake_command) as cluster:
            assert cluster.nats_url == server.url
            assert not (cluster.run_dir / "nats").exists()
        assert is_alive(server.pid)


KILLED_LAUNCHER = """
import asyncio, sys
from pathlib import Path
from lemix.bus import open_bus
from lemix.launcher import LocalCluster
from lemix.nats_server import NatsServer
from lemix.topology import ClusterOptions
from tests.integration.test_launcher import fake_command

async def main(folder):
    options = ClusterOptions(name="run", runs_dir=Path(folder), nodes=1, stages=2)
    async with LocalCluster(options, command_of=fake_command):
        print("ready", flush=True)
        await asyncio.Event().wait()

asyncio.run(main(sys.argv[1]))
"""


async def test_nothing_outlives_a_killed_launcher_and_the_next_one_tidies_up(harness: Harness) -> None:
    launched = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", KILLED_LAUNCHER, str(harness.folder)),
        stdout=asyncio.subprocess.PIPE,
        cwd=FAKE.parents[2],
    )
    assert launched.stdout is not None
    async with asyncio.timeout(30):
        assert await launched.stdout.readline() == b"ready\n"
    abandoned = list(default_base().glob(f"lemix-{launched.pid}-*"))
    launched.kill()
    await launched.wait()
    await until(lambda: marked_with(harness.mark) == {})
    assert len(abandoned) == 1 and abandoned[0].exists()
    async with harness.cluster():
        assert not abandoned[0].exists()
        assert (
            json.loads((harness.folder / "run" / "cluster.json").read_text())["launcher_pid"] == os.getpid()
        )
