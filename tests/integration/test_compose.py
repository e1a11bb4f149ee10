"""compose.yaml: valid by the schema, and its services work as they are written, as local processes."""

import asyncio
import json
import signal
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path

import jsonschema

from lemix.client import ApiClient
from lemix.health import HealthProbe
from lemix.nats_server import find_program
from lemix.topology import ClusterOptions, service_specs
from tests.support.compose import ROOT, Compose, Places, load

START_DEADLINE_S = 120.0
CHECK_DEADLINE_S = 180.0
DEVICE = "gpt2-small@rtx6000ada"
"""Stages only take the time that this one would: what is tried is how the processes find each other."""


def own_services(compose: Compose) -> dict[str, Compose]:
    """The services that run LeMix's own image."""
    return {name: service for name, service in compose["services"].items() if service["image"] == "lemix"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_the_file_is_valid_by_the_compose_specification() -> None:
    # The schema of the Compose Specification (Apache-2.0), as the package check-jsonschema ships it.
    schema = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(load())


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


def test_every_service_of_our_own_is_checked_and_started_again() -> None:
    for service in own_services(load()).values():
        assert service["healthcheck"]["test"]
        assert service["restart"] == "unless-stopped"


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
async def process(command: list[str], environment: dict[str, str] | None, log: Path) -> AsyncIterator[None]:
    with log.open("wb") as output:
        started = await asyncio.create_subprocess_exec(
            *command, env=environment, stdout=output, stderr=output
        )
    try:
        yield
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
    path = places.folder / "nats.conf"
    path.write_text(config)
    option, _ = compose["services"]["nats"]["command"]
    return [find_program(), option, str(path)]


async def is_well(places: Places, service: Compose) -> bool:
    """Whether the service's own health check says so."""
    kind, *command = service["healthcheck"]["test"]
    assert kind == "CMD"
    checking = await asyncio.create_subprocess_exec(
        *places.command(service, command),
        env=places.environment(service),
        stderr=asyncio.subprocess.DEVNULL,
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
            for name, service in own_services(compose).items():
                places.make_volumes(service)
                environment = places.environment(service)
                if "LEMIX_STAGE" in environment:
                    environment["LEMIX_EMULATE"] = DEVICE
                if name == "gateway":
                    environment["LEMIX_PORT"] = places.gateway.rpartition(":")[2]
                command = places.command(service, service["command"])
                await running.enter_async_context(process(command, environment, tmp_path / f"{name}.log"))
            async with asyncio.timeout(START_DEADLINE_S):
                await HealthProbe(f"http://{places.gateway}").wait()
            async with ApiClient(f"http://{places.gateway}", model="embedded") as api:
                completion = await api.complete("Return the", max_tokens=8, temperature=0)
            assert 1 <= completion.completion_tokens <= 8
            for service in own_services(compose).values():
                await until_well(places, service)
        for name in ("gateway", "scheduler", "trainer", "stage_worker.0.0", "stage_worker.1.1"):
            assert f"lemix.{name}".encode() in collector.received


async def test_a_check_of_what_does_not_run_fails(tmp_path: Path) -> None:
    """A check that cannot fail proves nothing."""
    places = Places(
        folder=tmp_path,
        **{name: f"127.0.0.1:{free_port()}" for name in ("nats", "nats_monitor", "gateway", "collector")},
    )
    services = [load()["services"][name] for name in ("scheduler", "node-0-stage-0", "trainer", "gateway")]
    async with asyncio.timeout(CHECK_DEADLINE_S):
        assert not any(await asyncio.gather(*(is_well(places, service) for service in services)))
