"""A gateway in this process, in front of a scripted cluster on the memory bus."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import msgspec
from fastapi import FastAPI
from msgspec import structs
from opentelemetry.sdk.trace.export import SpanExporter

from services.gateway.cluster_client import ClusterClient
from services.gateway.context import GatewayContext
from services.gateway.feedback.service import Feedback
from services.gateway.health import HealthProbe
from services.gateway.http.app import build_app
from services.gateway.http.server import listen, serve, server_config
from services.gateway.jobs.fine_tuning import FineTuning
from services.gateway.metrics import Metrics
from services.gateway.settings import GatewaySettings
from services.gateway.text.threads import TextThreads
from shared.addresses import authority
from shared.bus.base import Bus, Incoming
from shared.bus.memory import MemoryBroker
from shared.chat_template import ChatTemplate
from shared.clock import IdSource, SystemClock
from shared.encoding import ExampleEncoder
from shared.errors import RefusedError
from shared.messages.cluster import ClusterStatus, Heartbeat, NodeStatus, StatusRequest
from shared.messages.inference import (
    CancelTask,
    InferenceTask,
    Placed,
    SequenceResult,
    TaskFailed,
    TokenLogprob,
    TokensProduced,
)
from shared.model_files import ModelCard, read_card
from shared.settings import EMBEDDED_MODEL
from shared.subjects import CANCEL, FAILED, STATUS, SUBMIT, TOKENS
from shared.telemetry import Telemetry
from shared.text import TextTokenizer
from tests.support.chat_templates import CHATML

NODE = 3
VERSION = 7
MODEL = "tiny"
DEADLINE_S = 60.0

TOKENIZER = TextTokenizer.load(Path(EMBEDDED_MODEL))
CARD: ModelCard = read_card(Path(EMBEDDED_MODEL), MODEL)

Script = Callable[[InferenceTask], list[SequenceResult]]


def says(text: str) -> Script:
    """A model that always writes `text`, then an end token; cut at max_tokens as a real one is."""
    return lambda task: results_of(task, [*TOKENIZER.encode(text), CARD.eos_token_ids[0]])


def results_of(task: InferenceTask, tokens: list[int]) -> list[SequenceResult]:
    """The results by which a stage would tell of `tokens`, with log-probability -1 for each."""
    scored = tuple(_scored(token) for token in task.prompt[1:]) if task.prompt_logprobs else ()
    if task.sampling.max_tokens == 0:
        return [SequenceResult(task_id=task.task_id, prompt=scored, finish="length")]
    results = [SequenceResult(task_id=task.task_id, prompt=scored)] if scored else []
    for place, token in list(enumerate(tokens[: task.sampling.max_tokens]))[task.num_given :]:
        finish = "length" if place + 1 == task.sampling.max_tokens else None
        finish = "stop" if token in task.sampling.stop_token_ids else finish
        results.append(SequenceResult(task_id=task.task_id, token=_scored(token), index=place, finish=finish))
    return results


def schema_of(task: InferenceTask) -> dict[str, Any] | None:
    """The JSON Schema that the whole text is held to; None: there is none."""
    grammar = task.sampling.grammar or ""
    return json.loads(grammar)["grammars"][0]["json_schema"] if grammar.startswith("{") else None


def _scored(token: int) -> TokenLogprob:
    return TokenLogprob(token=token, logprob=-1.0, top=((token, -1.0), (5, -2.0)))


@dataclass
class FakeCluster:
    """Plays the scheduler and one node."""

    bus: Bus
    script: Script | None = None
    """The node's answers; None: nothing until the test says so."""
    submitted: asyncio.Queue[InferenceTask] = field(default_factory=asyncio.Queue)
    cancelled: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    traceparents: list[str] = field(default_factory=list)
    num_said: Counter[str] = field(default_factory=Counter)
    """Tokens of each task that `say` has produced."""
    slo_s: float = 0.0
    ttft_s: float | None = None
    """When first tokens are due after the arrival; None: the scheduler does not say."""
    tbt_s: float | None = None
    version: int = VERSION
    """The version of the weights that the node says it has."""
    refusals: list[RefusedError] = field(default_factory=list)
    """The next requests are refused with them."""
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """While it is clear, placements are not answered."""

    async def start(self) -> None:
        self.gate.set()
        await self.bus.respond(SUBMIT.at(), self._place)
        await self.bus.respond(STATUS.at(), self._status)
        await self.bus.subscribe(CANCEL.at(node=NODE), self._on_cancel)

    async def produce(self, task: InferenceTask, *results: SequenceResult) -> None:
        for result in results:
            message = TokensProduced(node=NODE, weights_version=self.version, results=(result,))
            await self.bus.publish(TOKENS.at(gateway=task.gateway), message)

    async def say(self, task: InferenceTask, text: str) -> None:
        """Produce the tokens of `text`, without an end."""
        for token in TOKENIZER.encode(text):
            index = task.num_given + self.num_said[task.task_id]
            self.num_said[task.task_id] += 1
            produced = TokenLogprob(token=token)
            await self.produce(task, SequenceResult(task_id=task.task_id, token=produced, index=index))

    async def fail(self, task: InferenceTask, code: int, reason: str) -> None:
        failed = TaskFailed(task_id=task.task_id, code=code, reason=reason)
        await self.bus.publish(FAILED.at(gateway=task.gateway), failed)

    async def _place(self, incoming: Incoming[InferenceTask]) -> Placed:
        task = incoming.message
        self.traceparents.append(incoming.traceparent)
        self.submitted.put_nowait(task)
        if self.refusals:
            raise self.refusals.pop(0)
        if self.script is not None:  # before the reply, so that tokens overtake it
            await self.produce(task, *self.script(task))
        await self.gate.wait()
        return Placed(node=NODE, ttft_s=self.ttft_s, tbt_s=self.tbt_s)

    async def _on_cancel(self, incoming: Incoming[CancelTask]) -> None:
        self.cancelled.put_nowait(incoming.message.task_id)

    async def _status(self, _: Incoming[StatusRequest]) -> ClusterStatus:
        node = NodeStatus(
            node=NODE, ready=True, inference_tasks=0, training_tasks=0, stages=(_heartbeat(0), _heartbeat(1))
        )
        return ClusterStatus(policy="round_robin", nodes=(node,), slo_s=self.slo_s)


def _heartbeat(stage: int) -> Heartbeat:
    values: dict[object, Any] = {int: 0, bool: True, str: "x"}
    filled = {
        field.name: values.get(field.type, "x") for field in structs.fields(Heartbeat) if field.required
    }
    known = {
        "node": NODE,
        "stage": stage,
        "weights_version": VERSION,
        "kv_blocks_used": 11,
        "kv_block_size": 16,
    }
    return msgspec.convert(filled | known, Heartbeat)


@dataclass
class World:
    """The objects that a test of the gateway works with."""

    cluster: FakeCluster
    gateway: ClusterClient
    app: FastAPI
    http: httpx.AsyncClient
    settings: GatewaySettings


@asynccontextmanager
async def gateway_world(
    script: Script | None = None,
    *,
    with_cluster: bool = True,
    exporter: SpanExporter | None = None,
    broker: MemoryBroker | None = None,
    run_dir: Path | None = None,
    ids: IdSource | None = None,
    template: str | None = CHATML,
    model: Path | None = None,
    tokenizer: TextTokenizer = TOKENIZER,
    deadline_s: float = DEADLINE_S,
    **settings: float | str,
) -> AsyncIterator[World]:
    """A running gateway; the block fails when it takes longer than `deadline_s`.

    `model` is a folder (None: the embedded model, with `template` for its chat template).

    Two that are given the same broker and run folder, one after the other, are a gateway and its restart.
    """
    broker, telemetry = broker or MemoryBroker(), Telemetry("gateway", exporter)
    bus, cluster = broker.connect(), FakeCluster(broker.connect(), script)
    if with_cluster:
        await cluster.start()
    with TemporaryDirectory() as folder:
        chosen = GatewaySettings.model_validate({"run_dir": run_dir or folder, **settings})
        ids = ids or IdSource(random.Random(0))
        encoder = _encoder_of(model) if model else embedded_encoder(template, tokenizer)
        fine_tuning = FineTuning(chosen, bus=bus, clock=SystemClock(), ids=ids, encoder=encoder)
        fine_tuning.load()
        context = _context(bus, telemetry, chosen, ids, fine_tuning, encoder)
        feedback = Feedback(
            chosen, bus=bus, clock=context.clock, encoder=encoder, text_threads=context.text_threads
        )
        feedback.load()
        app = build_app(context, fine_tuning, feedback)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            asyncio.timeout(deadline_s),
            context.cluster.running(),
            fine_tuning.running(),
            feedback.running(),
            httpx.AsyncClient(transport=transport, base_url="http://localhost") as http,
        ):
            yield World(cluster, context.cluster, app, http, chosen)
        await bus.close()
        await cluster.bus.close()
        telemetry.close()


def _encoder_of(model: Path) -> ExampleEncoder:
    card = read_card(model, MODEL)
    return ExampleEncoder.load(card, model, SystemClock(), max_tokens=card.context_length)


def embedded_encoder(template: str | None, tokenizer: TextTokenizer) -> ExampleEncoder:
    return ExampleEncoder(
        card=CARD,
        max_tokens=CARD.context_length,
        tokenizer=tokenizer,
        chat_template=ChatTemplate({"default": template}, {}, SystemClock()) if template else None,
    )


def _context(
    bus: Bus,
    telemetry: Telemetry,
    settings: GatewaySettings,
    ids: IdSource,
    fine_tuning: FineTuning,
    encoder: ExampleEncoder,
) -> GatewayContext:
    clock = SystemClock()
    assert encoder.tokenizer is not None
    cluster = ClusterClient(
        bus=bus,
        clock=clock,
        ids=ids,
        telemetry=telemetry,
        request_timeout_s=settings.request_timeout_s,
        may_mix_weights=settings.weights_consistency == "latest",
    )
    return GatewayContext(
        cluster=cluster,
        tokenizer=encoder.tokenizer,
        text_threads=TextThreads(settings.max_concurrent_requests),
        chat_template=encoder.chat_template,
        card=encoder.card,
        settings=settings,
        clock=clock,
        ids=ids,
        metrics=Metrics(),
        telemetry=telemetry,
        probe=HealthProbe(cluster, clock, card=encoder.card, timeout_s=settings.health_timeout_s),
        on_first_tokens=fine_tuning.first_tokens,
    )


@asynccontextmanager
async def served(world: World, host: str = "127.0.0.1") -> AsyncIterator[str]:
    """The world's app behind a real socket; yields its address."""
    listener = listen(host, 0)
    port = listener.getsockname()[1]
    async with asyncio.TaskGroup() as group:
        config = server_config(world.app, world.settings)
        server = group.create_task(serve(config, listener, before_end=world.gateway.end_sessions))
        yield f"http://{authority(host, port)}"
        server.cancel()
