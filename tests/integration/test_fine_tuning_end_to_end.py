"""Fine-tuning jobs on the real services: the served model learns; a killed gateway changes nothing."""

import asyncio
import json
import math
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio

from lemix.client import ApiClient, served_model
from lemix.launcher import LocalCluster
from lemix.topology import ClusterOptions
from shared import checkpoints
from shared.chat_template_files import load_chat_template
from shared.clock import SystemClock
from shared.settings import EMBEDDED_MODEL
from tests.support.processes import is_alive
from tests.support.waiting import LOOK_EVERY_S, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

PLACES = ("Northpoint", "Eastford", "Dunness", "Arnpoint", "Westhaven", "Southmere")
HELD_OUT = "Sea area Northpoint, issued at 04:20. Wind south force 5, veering west by noon. Sea rough."
DEADLINE_S = 240.0
"""Of one wait, the start of the cluster included: other test runs may share the cores."""
TERMINAL = ("succeeded", "failed", "cancelled")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    options = ClusterOptions(
        name="fine-tuning",
        runs_dir=tmp_path_factory.mktemp("runs"),
        nodes=1,
        stages=2,
        stages_per_worker=2,
        start_timeout_s=DEADLINE_S,
        extra_env={
            "LEMIX_CHECKPOINT_EVERY": "8",
            "LEMIX_CHECKPOINT_IDLE_S": "0.5",
            "LEMIX_ASK_AFTER_S": "2",
            "LEMIX_MAX_BATCHES_AHEAD": "4",
            "LEMIX_NATS_URL": "",
        },
    )
    async with LocalCluster(options) as running:
        yield running


def bulletins(num_examples: int) -> bytes:
    examples = [
        {
            "prompt": f"Sea area {PLACES[n % len(PLACES)]}, issued at {n % 24:02}:20.",
            "completion": f" Wind south force {3 + n % 5}, veering west by noon. Sea rough.",
        }
        for n in range(num_examples)
    ]
    return b"".join(json.dumps(example).encode() + b"\n" for example in examples)


def client_of(cluster: LocalCluster, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{cluster.api_url}/v1", api_key="none", **options)


async def create_job(
    client: openai.AsyncOpenAI, cluster: LocalCluster, num_examples: int, **hyperparameters: float
) -> Any:
    content = bulletins(num_examples)
    file = await client.files.create(file=("bulletins.jsonl", content), purpose="fine-tune")
    return await client.fine_tuning.jobs.create(
        model=await served_model(cluster.api_url),
        training_file=file.id,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        seed=3,
    )


class Jobs:
    """Looks at one job until it stands as is wanted."""

    def __init__(self, client: openai.AsyncOpenAI, job: Any) -> None:
        self._client = client
        self.job = job

    async def until(self, condition: Callable[[Any], bool]) -> Any:
        async with asyncio.timeout(DEADLINE_S):
            while not condition(self.job):
                await asyncio.sleep(LOOK_EVERY_S)
                self.job = await self._client.fine_tuning.jobs.retrieve(self.job.id)
        return self.job

    async def until_version(self, version: int) -> None:
        """The job has brought the weights there."""
        await self.until(lambda job: (job.lemix["weights_version"]["last"] or 0) >= version)


async def kill_gateway(cluster: LocalCluster) -> None:
    pid = cluster.pids["gateway"]
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not is_alive(pid))
    await until(lambda: cluster.pids.get("gateway") not in (None, pid))


def manifest(cluster: LocalCluster) -> checkpoints.Manifest:
    found = checkpoints.latest(cluster.run_dir / "checkpoints", 0)
    assert found is not None
    return found.manifest


def batch_ids(job: Any, num_epochs: int, per_epoch: int) -> list[str]:
    return [
        f"{job.id}-e{epoch}-b{batch:05}"
        for epoch in range(1, num_epochs + 1)
        for batch in range(1, per_epoch + 1)
    ]


async def test_a_job_succeeds_and_the_served_model_has_learnt(cluster: LocalCluster) -> None:
    model = await served_model(cluster.api_url)
    async with client_of(cluster, max_retries=0) as client, ApiClient(cluster.api_url, model=model) as scorer:
        before = await scorer.score(HELD_OUT)
        created = await create_job(client, cluster, 24, n_epochs=2, batch_size=4)
        job = await Jobs(client, created).until(lambda job: job.status in TERMINAL)
        after = await scorer.score(HELD_OUT)
        answer = await client.completions.create(model=job.fine_tuned_model, prompt="Sea", max_tokens=1)
        saved = [each async for each in client.fine_tuning.jobs.checkpoints.list(job.id)]
        events: list[Any] = [each async for each in client.fine_tuning.jobs.list_events(job.id)]
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model == model
    assert job.lemix["weights_version"] == {"first": 1, "last": 12}
    assert answer.system_fingerprint == "weights-12-12"
    assert after.nll_sum < 0.8 * before.nll_sum
    assert sorted(manifest(cluster).recent_batch_ids) == batch_ids(job, 2, 6)
    assert saved[0].fine_tuned_model_checkpoint == f"{model}:weights-{manifest(cluster).version}"
    losses = [event.data["train_loss"] for event in reversed(events) if event.type == "metrics"]
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])


def preference(place: str) -> dict[str, Any]:
    return {
        "input": {"messages": [{"role": "user", "content": f"How is the sea off {place}?"}]},
        "preferred_output": [{"role": "assistant", "content": "Sea rough, with rain."}],
        "non_preferred_output": [{"role": "assistant", "content": "Sea calm, and no wind."}],
    }


async def margin(scorer: ApiClient, place: str) -> float:
    """By how much the model makes the preferred answer likelier than the other one, in nats."""
    folder, example = Path(EMBEDDED_MODEL), preference(place)
    template = load_chat_template(folder, SystemClock())
    assert template is not None
    losses = []
    for output in ("preferred_output", "non_preferred_output"):
        turns = [*example["input"]["messages"], *example[output]]
        losses.append((await scorer.score(template.render(turns, add_generation_prompt=False))).nll_sum)
    return losses[1] - losses[0]


async def test_a_dpo_job_makes_the_preferred_answers_likelier(cluster: LocalCluster) -> None:
    model = await served_model(cluster.api_url)
    content = b"".join(json.dumps(preference(place)).encode() + b"\n" for place in PLACES[:5])
    async with client_of(cluster, max_retries=0) as client, ApiClient(cluster.api_url, model=model) as scorer:
        before = await margin(scorer, PLACES[5])
        file = await client.files.create(file=("preferences.jsonl", content), purpose="fine-tune")
        hyperparameters = {"beta": 0.5, "n_epochs": 3, "batch_size": 2}
        created = await client.fine_tuning.jobs.create(
            model=model,
            training_file=file.id,
            method={"type": "dpo", "dpo": {"hyperparameters": hyperparameters}},
            seed=3,
        )
        job = await Jobs(client, created).until(lambda job: job.status in TERMINAL)
        after = await margin(scorer, PLACES[5])
        events: list[Any] = [each async for each in client.fine_tuning.jobs.list_events(job.id)]
    assert job.status == "succeeded", job.error
    losses = [event.data["train_loss"] for event in reversed(events) if event.type == "metrics"]
    assert len(losses) == 9
    assert losses[-1] < 0.5 * math.log(2)
    assert after > before + 1.0


async def test_a_gateway_killed_in_a_job_goes_on_with_it_and_each_batch_is_applied_once(
    cluster: LocalCluster,
) -> None:
    before = manifest(cluster)
    async with client_of(cluster, max_retries=8) as client:
        jobs = Jobs(client, await create_job(client, cluster, 60, n_epochs=2, batch_size=3))
        for step in (4, 15):
            await jobs.until_version(before.version + step)
            await kill_gateway(cluster)
        assert jobs.job.status == "running", "nothing was at stake"
        job = await jobs.until(lambda job: job.status in TERMINAL)
    assert job.status == "succeeded", job.error
    after = manifest(cluster)
    new = [batch_id for batch_id in after.recent_batch_ids if batch_id not in before.recent_batch_ids]
    assert sorted(new) == batch_ids(job, 2, 20)
    assert after.version == before.version + 40
