"""The whole system as real processes over real NATS: one node of two stages, by its public doors only."""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import nats
import openai
import pytest
import pytest_asyncio
from rich.console import Console

from lemix.bus import open_bus
from lemix.client import ApiClient, Score, served_model
from lemix.launcher import LocalCluster
from lemix.rejected_command import fetch_rejected, rejections, run_rejected
from lemix.run_choice import Target
from lemix.topology import ClusterOptions
from shared import checkpoints, subjects
from shared.bus.permissions import Role
from shared.messages.training import RejectedBatch
from tests.support.nats_clients import client_of
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELD_OUT = "Sea area Northpoint, issued at 04:20. Wind south force 5, veering west by noon. Sea rough."
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    options = ClusterOptions(
        name="end-to-end",
        runs_dir=tmp_path_factory.mktemp("runs"),
        nodes=1,
        stages=2,
        stages_per_worker=2,
        extra_env={"LEMIX_CHECKPOINT_EVERY": "4", "LEMIX_CHECKPOINT_IDLE_S": "0.2", "LEMIX_NATS_URL": ""},
    )
    async with LocalCluster(options) as running:
        yield running


def bulletin_batch(number: int) -> dict[str, Any]:
    places = ("Northpoint", "Eastford", "Dunness", "Arnpoint")
    texts = [
        f"Sea area {place}, issued at {hour:02}:20. Wind south force {force}, veering west. Sea rough."
        for hour, (place, force) in enumerate(zip(places, (3, 4, 5, 6), strict=True), start=number % 20)
    ]
    return {"id": f"bulletin-{number}", "examples": [{"text": text} for text in texts]}


async def publish(cluster: LocalCluster, *bodies: bytes, headers: dict[str, str] | None = None) -> None:
    async with open_bus(cluster.nats_url, cluster.nats_users, Role.INGEST) as bus:
        for body in bodies:
            await bus.publish_durable(subjects.BATCHES, body, headers=headers)


def durable(cluster: LocalCluster) -> checkpoints.Manifest | None:
    found = checkpoints.latest(cluster.run_dir / "checkpoints", 0)
    return found.manifest if found else None


async def durable_version(cluster: LocalCluster, at_least: int) -> checkpoints.Manifest:
    await until(lambda: (manifest := durable(cluster)) is not None and manifest.version >= at_least)
    manifest = durable(cluster)
    assert manifest is not None
    return manifest


def spans(cluster: LocalCluster, matches: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    lines = (cluster.run_dir / "spans.jsonl").read_text().splitlines()
    return [span for line in lines if matches(span := json.loads(line))]


async def test_the_official_client_completes_and_streams(cluster: LocalCluster) -> None:
    model = await served_model(cluster.api_url)
    arguments: dict[str, Any] = {
        "model": model,
        "prompt": "The open() function",
        "max_tokens": 12,
        "temperature": 0,
    }
    async with openai.AsyncOpenAI(base_url=f"{cluster.api_url}/v1", api_key="none", max_retries=0) as client:
        whole = await client.completions.create(**arguments)
        stream = await client.completions.create(**arguments, stream=True)
        pieces = [chunk.choices[0].text async for chunk in stream if chunk.choices]
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(**{**arguments, "model": "no-such-model"})
    assert whole.usage is not None and whole.usage.completion_tokens >= 1
    assert "".join(pieces) == whole.choices[0].text != ""


async def ask_traced(cluster: LocalCluster) -> None:
    """A request with `TRACEPARENT`."""
    async with openai.AsyncOpenAI(base_url=f"{cluster.api_url}/v1", api_key="none") as client:
        await client.completions.create(
            model=await served_model(cluster.api_url),
            prompt="Return the",
            max_tokens=2,
            extra_headers={"traceparent": TRACEPARENT},
        )


async def whole_trace(cluster: LocalCluster, worker_of: dict[int, str]) -> None:
    """Wait for the whole trace of `ask_traced`; `worker_of`: the service by the stage that it holds."""
    expected = {"lemix.gateway", "lemix.scheduler", *worker_of.values()}

    def is_whole() -> bool:
        """Each process exports its spans in its own time, a child often before its parent."""
        found = spans(cluster, lambda span: bool(span["trace_id"] == TRACE_ID))
        unknown_parents = {span["parent_span_id"] for span in found} - {span["span_id"] for span in found}
        return (
            {span["service"] for span in found} == expected
            and unknown_parents == {"b7ad6b7169203331"}
            and stages_of(found, "stage.prefill") == stages_of(found, "stage.decode") == worker_of
        )

    await until(is_whole)


def stages_of(found: list[dict[str, Any]], name: str) -> dict[int, str]:
    """The services that have spans of that name, by the stage that they tell of."""
    return {span["attributes"]["lemix.stage"]: span["service"] for span in found if span["name"] == name}


async def train_traced(cluster: LocalCluster, *batches: dict[str, Any]) -> None:
    """Publish batches with a trace of their own."""
    headers = {"traceparent": TRACEPARENT.replace(TRACE_ID, TRACE_ID[::-1])}
    await publish(cluster, *(json.dumps(batch).encode() for batch in batches), headers=headers)


async def whole_trace_of_training(cluster: LocalCluster, worker_of: dict[int, str]) -> None:
    """Wait for the trace of `train_traced` to be in every service and stage."""
    expected = {"lemix.trainer", "lemix.scheduler", *worker_of.values()}

    def is_whole() -> bool:
        found = spans(cluster, lambda span: bool(span["trace_id"] == TRACE_ID[::-1]))
        forward, step = (stages_of(found, name) for name in ("stage.training_forward", "stage.step"))
        return {span["service"] for span in found} == expected and forward == step == worker_of

    await until(is_whole)


ONE_WORKER = dict.fromkeys((0, 1), "lemix.stage_worker.0.0-1")
"""It holds all stages of its node."""


async def test_one_request_is_one_trace_through_every_service_and_stage(cluster: LocalCluster) -> None:
    await ask_traced(cluster)
    await whole_trace(cluster, ONE_WORKER)


async def test_traces_go_through_stages_that_each_have_a_worker(tmp_path: Path) -> None:
    options = ClusterOptions(
        name="apart",
        runs_dir=tmp_path,
        nodes=1,
        stages=2,
        stages_per_worker=1,
        emulate="gpt2-small@rtx6000ada",
        extra_env={"LEMIX_NATS_URL": ""},
    )
    worker_of = {0: "lemix.stage_worker.0.0", 1: "lemix.stage_worker.0.1"}
    async with LocalCluster(options) as apart:
        await ask_traced(apart)
        await train_traced(apart, bulletin_batch(0))
        await whole_trace(apart, worker_of)
        await whole_trace_of_training(apart, worker_of)


@dataclass(frozen=True)
class Trained:
    """What six batches did."""

    before: Score
    after: Score
    manifest: checkpoints.Manifest


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trained(cluster: LocalCluster) -> Trained:
    async with ApiClient(cluster.api_url, model=await served_model(cluster.api_url)) as client:
        before = await client.score(HELD_OUT)
        await train_traced(cluster, *map(bulletin_batch, range(6)))
        manifest = await durable_version(cluster, 6)
        return Trained(before, await client.score(HELD_OUT), manifest)


async def test_training_changes_the_weights_that_answer(cluster: LocalCluster, trained: Trained) -> None:
    assert set(trained.manifest.recent_batch_ids) == {f"bulletin-{number}" for number in range(6)}
    assert trained.after.nll_sum < 0.8 * trained.before.nll_sum
    await whole_trace_of_training(cluster, ONE_WORKER)


@pytest.mark.usefixtures("trained")
async def test_a_batch_published_twice_is_applied_once(cluster: LocalCluster) -> None:
    again = msgpack.packb(bulletin_batch(3) | {"examples": [{"text": "Another body under an old id."}]})
    await publish(cluster, again, json.dumps(bulletin_batch(100)).encode())
    manifest = await durable_version(cluster, 7)
    assert manifest.version == 7
    assert sorted(manifest.recent_batch_ids) == sorted([*(f"bulletin-{n}" for n in range(6)), "bulletin-100"])


async def test_a_bad_batch_is_rejected_with_its_reason_and_what_was_published(
    cluster: LocalCluster,
) -> None:
    target = Target(cluster.nats_url, "run one", cluster.nats_users)
    bodies = (b"{not json", b'{"id": "empty", "examples": []}')
    await publish(cluster, *bodies)
    async with open_bus(cluster.nats_url, cluster.nats_users) as bus, asyncio.timeout(30):
        told: list[RejectedBatch] = []
        while len(told) < len(bodies):
            told = [each async for each in rejections(bus)]
    assert all(each.reason for each in told)
    for each, body in zip(told, bodies, strict=True):
        assert await fetch_rejected(target, each.sequence) == body
    shown = Console(file=io.StringIO())
    await run_rejected(target, shown)
    assert isinstance(shown.file, io.StringIO)
    listed = shown.file.getvalue()
    assert all(f" {each.sequence} " in listed and each.batch_id in listed for each in told)


async def test_malformed_and_oversize_messages_break_nothing(cluster: LocalCluster) -> None:
    place: dict[str, int | str] = {"node": 0, "stage": 0, "gateway": "any.one"}
    topics = [
        value
        for value in vars(subjects).values()
        if isinstance(value, subjects.Topic | subjects.RequestTopic)
    ]
    assert len(topics) > 10
    refused: list[Exception] = []

    async def note(error: Exception) -> None:
        refused.append(error)

    assert cluster.nats_users is not None
    for role in Role:
        client = await client_of(cluster.nats_url, cluster.nats_users, role, note)
        for topic in topics:
            for stage in (0, 1):
                await client.publish(topic.at(**(place | {"stage": stage})).name, b"\xc1 no message")
        with pytest.raises(nats.errors.MaxPayloadError):
            await client.publish(subjects.ASSIGN.at(node=0).name, bytes(2 << 20))
        await client.flush()
        await client.close()
    assert refused
    pids = cluster.pids
    async with ApiClient(cluster.api_url, model=await served_model(cluster.api_url)) as api:
        completion = await api.complete("The open() function", max_tokens=4)
    assert completion.completion_tokens >= 1
    assert cluster.pids == pids, "no service was restarted"


@pytest.mark.usefixtures("trained")
async def test_the_checkpoint_is_a_model_that_transformers_loads(cluster: LocalCluster) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = checkpoints.latest(cluster.run_dir / "checkpoints", 0)
    assert checkpoint is not None
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder)
    tokens = AutoTokenizer.from_pretrained(checkpoint.folder)(HELD_OUT, return_tensors="pt").input_ids
    loss = model(tokens, labels=tokens).loss.item()
    async with ApiClient(cluster.api_url, model=await served_model(cluster.api_url)) as client:
        score = await client.score(HELD_OUT)
    assert score.nll_sum / score.num_tokens == pytest.approx(loss, abs=1e-4)
