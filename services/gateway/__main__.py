"""Run the gateway: python -m services.gateway"""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.gateway.access.exposure import check_exposure, is_loopback
from services.gateway.access.key_file import read_keys
from services.gateway.cluster_client import ClusterClient
from services.gateway.context import GatewayContext
from services.gateway.feedback.service import Feedback
from services.gateway.health import HealthProbe
from services.gateway.http.app import build_app
from services.gateway.http.request_log import show_request_ids
from services.gateway.http.server import allow_many_connections, listen, serve, server_config
from services.gateway.jobs.fine_tuning import FineTuning
from services.gateway.metrics import Metrics
from services.gateway.settings import GatewaySettings
from services.gateway.text.threads import TextThreads
from shared.addresses import authority
from shared.bus.access import access_of
from shared.bus.base import Bus
from shared.bus.nats import NatsBus
from shared.bus.permissions import Role
from shared.clock import Clock
from shared.encoding import ExampleEncoder
from shared.lifecycle import World, load_settings, run_service
from shared.model_files import CONFIG_FILES, TOKENIZER_FILES, name_of, read_card, resolve
from shared.text import TextTokenizer

log = logging.getLogger(__name__)


_OBJECTS_BEFORE_COLLECTION = 50_000
"""Python's own 700 are made within 10 ms under load."""


def load_model(settings: GatewaySettings, clock: Clock) -> tuple[TextTokenizer, ExampleEncoder]:
    """Load the gateway's knowledge of the model. Raises ConfigurationError or UnsupportedModelError."""
    folder = resolve(settings.model, CONFIG_FILES + TOKENIZER_FILES)
    card = read_card(folder, name_of(settings.model))
    encoder = ExampleEncoder.load(
        card,
        folder,
        clock,
        max_tokens=settings.max_microbatch_tokens,
        chat_template=settings.chat_template,
    )
    # The trainer can do without a tokenizer; here the file must be there, and this says which.
    return encoder.tokenizer or TextTokenizer.load(folder), encoder


def check_access(settings: GatewaySettings) -> None:
    """Raises ConfigurationError when others could reach the gateway without a key."""
    has_keys = read_keys(settings.keys_path) is not None
    check_exposure(settings.host, has_keys=has_keys, insecure=settings.insecure)
    if not has_keys and not is_loopback(settings.host):
        log.warning("INSECURE: whoever reaches %s may use and train the model", settings.host)


def _collect_rarely() -> None:
    """Keep the garbage collector from pausing streams: a full collection of what is here takes 0.1 s."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_OBJECTS_BEFORE_COLLECTION)


@asynccontextmanager
async def ingest_bus(world: World, settings: GatewaySettings) -> AsyncIterator[Bus]:
    """The bus on which training batches may be published: where NATS asks for users, as another user."""
    if not world.nats_user:
        yield world.bus
        return
    access = access_of(settings, Role.INGEST)
    bus = await NatsBus.connect(
        settings.nats_url, name="gateway.ingest", access=access, traceparent=world.telemetry.traceparent
    )
    try:
        yield bus
    finally:
        await bus.close()


async def run(world: World, settings: GatewaySettings) -> None:
    """Serve HTTP until cancelled, or until the second of two buses fails."""
    check_access(settings)
    async with ingest_bus(world, settings) as ingest, asyncio.TaskGroup() as tasks:
        watch = tasks.create_task(ingest.wait_failed())
        await _run(world, settings, ingest)
        watch.cancel()


async def _run(world: World, settings: GatewaySettings, ingest: Bus) -> None:
    tokenizer, encoder = await asyncio.to_thread(load_model, settings, world.clock)
    cluster = ClusterClient(
        bus=world.bus,
        clock=world.clock,
        ids=world.ids,
        telemetry=world.telemetry,
        user=world.nats_user or Role.GATEWAY,
        request_timeout_s=settings.request_timeout_s,
        may_mix_weights=settings.weights_consistency == "latest",
    )
    fine_tuning = FineTuning(settings, bus=ingest, clock=world.clock, ids=world.ids, encoder=encoder)
    text_threads = TextThreads(settings.max_concurrent_requests)
    feedback = Feedback(settings, bus=ingest, clock=world.clock, encoder=encoder, text_threads=text_threads)
    context = GatewayContext(
        cluster=cluster,
        tokenizer=tokenizer,
        text_threads=text_threads,
        chat_template=encoder.chat_template,
        card=encoder.card,
        settings=settings,
        clock=world.clock,
        ids=world.ids,
        metrics=Metrics(),
        telemetry=world.telemetry,
        probe=HealthProbe(cluster, world.clock, card=encoder.card, timeout_s=settings.health_timeout_s),
        on_first_tokens=fine_tuning.first_tokens,
    )
    show_request_ids()
    _collect_rarely()
    allow_many_connections()
    listener = listen(settings.host, settings.port)
    await asyncio.to_thread(fine_tuning.load)
    await asyncio.to_thread(feedback.load)
    async with cluster.running(), fine_tuning.running(), feedback.running():
        address = authority(settings.host, listener.getsockname()[1])
        world.health.begin(f"http://{address}", context.probe.is_ready)
        config = server_config(build_app(context, fine_tuning, feedback), settings)
        await serve(config, listener, before_end=cluster.end_sessions)


if __name__ == "__main__":
    settings = load_settings(GatewaySettings)
    run_service("gateway", Role.GATEWAY, settings, lambda world: run(world, settings))
