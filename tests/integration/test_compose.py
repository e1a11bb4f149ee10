"""compose.yaml: valid by the schema, and its services work as they are written, as local processes."""

import asyncio
import itertools
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest

from lemix.client import ApiClient
from lemix.health import HealthProbe
from lemix.nats_server import find_program
from lemix.nats_users import make_users
from lemix.topology import ClusterOptions, service_specs
from shared.bus.permissions import RULES, Role
from shared.subjects import BATCHES
from tests.support.compose import ROOT, Compose, Places, load, own_services
from tests.support.nats_clients import client_of

START_DEADLINE_S = 120.0
CHECK_DEADLINE_S = 180.0
HEALTH_AGE_S = 61
"""A file so old is no sign of health."""
DEVICE = "gpt2-small@rtx6000ada"
"""Stages only take the time that this one would: what is tried is how the processes find each other."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_the_files_are_valid_by_the_compose_specification(name: str) -> None:
    # The schema of the Compose Specification (Apache-2.0), as the package check-jsonschema ships it.
    schema = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(load(name))


def test_it_runs_the_same_processes_with_the_same_settings_as_the_launcher() -> None:
    options = ClusterOptions(nodes=2, stages=2, stages_per_worker=1, policy="round_robin", model="m")
    launched = service_specs(
        options, nats_url="", nats_users=None, port=8000, shm_dir=Path("/shm"), num_cores=2, inherited={}
    )
    composed = own_services(load())
    assert set(composed) == {spec.name for spec in launched}
    for spec in launched:
        assert composed[spec.name]["command"][1:] == list(spec.command[1:])
        assert set(spec.environment) <= set(composed[spec.name]["environment"])
        for name in ("LEMIX_NODE", "LEMIX_STAGE", "LEMIX_NUM_STAGES", "LEMIX_DEVICE", "OMP_NUM_THREADS"):
            assert composed[spec.name]["environment"].get(name) == spec.environment.get(name)


def test_every_port_is_published_for_this_machine_only() -> None:
    for name, service in load()["services"].items():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), name


def test_the_stages_of_a_node_and_only_they_share_their_memory() -> None:
    def memory(name: str) -> str:
        stage = own_services(load())[name]
        (volume,) = (v for v in stage["volumes"] if v.endswith(":" + stage["environment"]["LEMIX_SHM_DIR"]))
        return str(volume)

    assert memory("node-0-stage-0") == memory("node-0-stage-1")
    assert memory("node-1-stage-0") == memory("node-1-stage-1")
    assert memory("node-0-stage-0") != memory("node-1-stage-0")


def test_every_service_is_confined_and_ours_are_built_and_checked() -> None:
    for name, service in load()["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["read_only"] is True, name
        assert service["mem_limit"], name
        assert set(service["logging"]["options"]) == {"max-size", "max-file"}, name
        assert service["restart"] == ("no" if name == "nats-users" else "on-failure:10"), name
        assert service["image"] != "lemix" or service["build"]["context"] == ".", name
    assert "USER lemix" in (ROOT / "Dockerfile").read_text()


def test_each_service_sees_the_nats_users_of_its_own_roles_alone() -> None:
    mounts = {
        name: {volume.split(":")[1].rpartition("/")[2] for volume in service["volumes"] if "user-" in volume}
        for name, service in load()["services"].items()
        if name not in ("nats", "otel-collector")
    }
    roles = {role.value for role in Role}
    assert mounts.pop("nats-users") == roles
    assert mounts.pop("lemix") == {"operator", "ingest"}
    assert mounts.pop("gateway") == {"gateway", "ingest"}
    for name, users in mounts.items():
        assert users == ({name} if name in roles else {"stage_worker"}), name
    assert all(f" {role}" in (ROOT / "Dockerfile").read_text() for role in roles)


def test_what_the_build_can_be_told_arrives() -> None:
    declared = set(re.findall(r"^ARG (\w+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    assert declared == {"TORCH", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST"}
    for service in own_services(load()).values():
        assert set(service["build"]["args"]) == declared


def test_a_gpu_worker_holds_all_stages_in_the_place_of_those_on_cpus() -> None:
    added, composed = load("compose.gpu.yaml")["services"], load()["services"]
    worker = added["node-0"]
    assert composed[worker["extends"]["service"]]["command"] == ["python", "-m", "services.stage_worker"]
    environment = worker["environment"]
    assert environment["LEMIX_STAGES_HELD"] == environment["LEMIX_NUM_STAGES"]
    assert environment["LEMIX_NUM_STAGES"] == added["scheduler"]["environment"]["LEMIX_NUM_STAGES"]
    assert environment["LEMIX_DEVICE"].startswith("cuda:")
    assert {name for name, service in added.items() if service.get("profiles")} == {
        name for name in composed if "stage" in name
    }


class Collector:
    """Takes traces as an OpenTelemetry collector does, and keeps their bytes."""

    def __init__(self) -> None:
        self.received = b""

    @contextmanager
    def listening(self) -> Iterator[str]:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.received += self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


@asynccontextmanager
async def process(
    command: list[str], environment: dict[str, str] | None, log: Path
) -> AsyncIterator[asyncio.subprocess.Process]:
    with log.open("wb") as output:
        started = await asyncio.create_subprocess_exec(
            *command, env=environment, stdout=output, stderr=output
        )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(15):
                await started.wait()
        except TimeoutError:
            started.kill()
            await started.wait()


def nats_command(compose: Compose, places: Places) -> list[str]:
    """The real server, with the committed configuration but for ports and folder."""
    config = (ROOT / "deploy" / "nats.conf").read_text()
    for there, here in (
        ("port: 4222", f"listen: {places.nats}"),
        ("http_port: 8222", f"http: {places.nats_monitor}"),
        ('"/data"', f'"{places.folder / "nats"}"'),
    ):
        assert there in config
        config = config.replace(there, here)
    make_users(places.nats_users)
    path = places.folder / "nats.conf"
    path.write_text(config)
    option, _ = compose["services"]["nats"]["command"]
    return [find_program(), option, str(path)]


NONSENSE = (
    b"",
    b"\xc0",  # nil
    b"\x80",  # an empty map
    b"\x93\x01\x02\x03",  # a list of numbers
    b"\x81\xa7task_id\x07",  # a number where a string belongs
    b'{"task_id": "json"}',
    b"\x81" * 5000,  # maps in maps, without an end
    random.Random(0).randbytes(1000),
    bytes(900_000),
)


async def send_nonsense(places: Places) -> None:
    """On every subject, as a user who may; then a batch that is none, which the trainer has to reject."""

    async def on_error(_: Exception) -> None:
        """Not every sender may enter every stage."""

    url = f"nats://{places.nats}"
    clients = {role: await client_of(url, places.nats_users, role, on_error) for role in Role}
    for rule in RULES:
        for stage in range(2):
            subject = rule.topic.pattern.format(node=0, stage=stage, gateway="gateway.unknown")
            for sender, body in itertools.product(rule.senders, NONSENSE):
                await clients[sender].publish(subject, body)
    ingest = clients[Role.INGEST]
    await ingest.jetstream().publish(BATCHES, b"nonsense")
    for client in clients.values():
        await client.flush()
        await client.close()


async def is_well(places: Places, service: Compose) -> bool:
    """Whether the service's own health check says so."""
    checking = await asyncio.create_subprocess_exec(
        *places.check(service), env=places.environment(service), stderr=asyncio.subprocess.DEVNULL
    )
    return await checking.wait() == 0


async def until_well(places: Places, service: Compose) -> None:
    async with asyncio.timeout(CHECK_DEADLINE_S):
        while not await is_well(places, service):
            pass


async def test_its_services_serve_a_completion_and_are_well_by_their_own_checks(tmp_path: Path) -> None:
    compose, collector = load(), Collector()
    with collector.listening() as collector_address:
        ports = [f"127.0.0.1:{free_port()}" for _ in range(3)]
        places = Places(
            folder=tmp_path,
            nats=ports[0],
            nats_monitor=ports[1],
            gateway=ports[2],
            collector=collector_address,
        )
        async with AsyncExitStack() as running:
            await running.enter_async_context(
                process(nats_command(compose, places), None, tmp_path / "nats.log")
            )
            started: dict[str, asyncio.subprocess.Process] = {}
            for name, service in own_services(compose).items():
                places.make_folders(service)
                environment = places.environment(service)
                if "LEMIX_STAGE" in environment:
                    environment["LEMIX_EMULATE"] = DEVICE
                if name == "gateway":
                    environment["LEMIX_PORT"] = places.gateway.rpartition(":")[2]
                log = tmp_path / f"{name}.log"
                command = places.command(service)
                started[name] = await running.enter_async_context(process(command, environment, log))
            async with asyncio.timeout(START_DEADLINE_S):
                await HealthProbe(f"http://{places.gateway}").wait()
            async with ApiClient(f"http://{places.gateway}", model="embedded") as api:
                completion = await api.complete("Return the", max_tokens=8, temperature=0)
                assert 1 <= completion.completion_tokens <= 8
                await send_nonsense(places)
                assert (await api.complete("Return the", max_tokens=8)).completion_tokens >= 1
            for service in own_services(compose).values():
                await until_well(places, service)
            assert {name: process.returncode for name, process in started.items()} == dict.fromkeys(started)
        for name in ("gateway", "scheduler", "trainer", "stage_worker.0.0", "stage_worker.1.1"):
            assert f"lemix.{name}".encode() in collector.received


def test_a_check_fails_without_the_file_and_with_an_old_one(tmp_path: Path) -> None:
    """A check that cannot fail proves nothing."""
    command = own_services(load())["scheduler"]["healthcheck"]["test"][1]
    file = tmp_path / "healthy"

    def is_well() -> bool:
        environment = os.environ | {"LEMIX_HEALTH_FILE": str(file)}
        return (
            subprocess.run(["sh", "-c", command], env=environment, stderr=subprocess.DEVNULL).returncode == 0
        )

    assert not is_well()
    file.touch()
    assert is_well()
    os.utime(file, times=(0, file.stat().st_mtime - HEALTH_AGE_S))
    assert not is_well()


def test_a_check_takes_less_of_the_processor_than_an_interpreter_that_only_starts(tmp_path: Path) -> None:
    """It is made in every container, again and again, and imports nothing of ours."""
    service = own_services(load())["scheduler"]
    file = tmp_path / "healthy"
    file.touch()
    check = ["sh", "-c", service["healthcheck"]["test"][1]]
    its = processor_s(check, LEMIX_HEALTH_FILE=str(file))
    assert its < processor_s([sys.executable, "-I", "-S", "-c", ""])


def processor_s(command: list[str], **environment: str) -> float:
    """What the command takes of the processor, ten times."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(10):
        subprocess.run(command, env=os.environ | environment, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
