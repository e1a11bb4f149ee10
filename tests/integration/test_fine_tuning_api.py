"""Files and fine-tuning jobs over HTTP by the official client, in front of a scripted trainer."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import openai
import pytest

from services.trainer.intake.data import read_body
from shared.bus.memory import MemoryBroker
from shared.clock import IdSource
from shared.messages.weights import JudgedVersion
from tests.integration.test_gateway_tokens import LONG, BlockedTokenizer
from tests.support.fake_trainer import FakeTrainer
from tests.support.gateway import MODEL, NODE, World, gateway_world, says, served
from tests.support.waiting import LOOK_EVERY_S, until

EXAMPLES = [{"prompt": f"What is {n}?", "completion": f" It is {n}."} for n in range(10)]
PREFERENCES: list[dict[str, Any]] = [
    {
        "input": {"messages": [{"role": "user", "content": f"What is {n}?"}]},
        "preferred_output": [{"role": "assistant", "content": f"It is {n}."}],
        "non_preferred_output": [{"role": "assistant", "content": "Who knows."}],
    }
    for n in range(3)
]
TERMINAL = ("succeeded", "failed", "cancelled")


def jsonl(*examples: object) -> bytes:
    return b"".join(json.dumps(example).encode() + b"\n" for example in examples)


@dataclass
class Api:
    """A gateway, the official client in front of it, and the trainer behind it."""

    client: openai.AsyncOpenAI
    trainer: FakeTrainer
    world: World

    async def upload(self, content: bytes | None = None, name: str = "train.jsonl") -> str:
        content = jsonl(*EXAMPLES) if content is None else content
        return (await self.client.files.create(file=(name, content), purpose="fine-tune")).id

    async def create(self, **fields: Any) -> Any:
        fields = {"model": MODEL, **fields}
        if "training_file" not in fields:
            fields["training_file"] = await self.upload()
        return await self.client.fine_tuning.jobs.create(**fields)

    async def job(self, job_id: str) -> Any:
        return await self.client.fine_tuning.jobs.retrieve(job_id)

    async def until(self, job_id: str, *statuses: str) -> Any:
        return await self.until_shows(job_id, lambda job: job.status in statuses)

    async def until_shows(self, job_id: str, condition: Any) -> Any:
        while not condition(job := await self.job(job_id)):  # noqa: ASYNC110  # a client can only ask again
            await asyncio.sleep(LOOK_EVERY_S)
        return job

    async def until_applied(self, num_batches: int) -> None:
        await until(lambda: len(self.trainer.applied) >= num_batches)

    async def until_checkpoint(self, job_id: str) -> None:
        checkpoints = self.client.fine_tuning.jobs.checkpoints
        while not (await checkpoints.list(job_id)).data:  # noqa: ASYNC110  # a client can only ask again
            await asyncio.sleep(LOOK_EVERY_S)

    async def events(self, job_id: str) -> list[Any]:
        """All, oldest first."""
        return [event async for event in self.client.fine_tuning.jobs.list_events(job_id)][::-1]


@asynccontextmanager
async def api(
    broker: MemoryBroker | None = None, trainer: FakeTrainer | None = None, *, seed: int = 0, **options: Any
) -> AsyncIterator[Api]:
    broker = broker or MemoryBroker()
    own = trainer or FakeTrainer(broker.connect())
    running = None if trainer else asyncio.create_task(own.run())
    options = {"ids": IdSource(random.Random(seed)), **options}
    async with (
        gateway_world(broker=broker, **options) as world,
        served(world) as address,
        openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        yield Api(client, own, world)
    if running is not None:
        running.cancel()
        await asyncio.wait([running])


def names_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


async def refusal(request: Any) -> dict[str, Any]:
    """What the client is told, in OpenAI's shape, with its status."""
    with pytest.raises(openai.APIStatusError) as raised:
        await request
    error: dict[str, Any] = raised.value.response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error | {"status": raised.value.status_code}


# Files


async def test_a_file_is_kept_shown_listed_read_and_deleted() -> None:
    content = jsonl(*EXAMPLES)
    async with api() as here:
        files = here.client.files
        kept = await files.create(file=("my file.jsonl", content), purpose="fine-tune")
        assert (kept.object, kept.filename, kept.bytes) == ("file", "my file.jsonl", len(content))
        assert (kept.purpose, kept.status) == ("fine-tune", "processed")
        assert await files.retrieve(kept.id) == kept
        assert (await files.content(kept.id)).content == content
        assert [file async for file in files.list()] == [kept]
        assert (await files.delete(kept.id)).deleted
        assert (await refusal(files.retrieve(kept.id)))["status"] == 404
        assert (await refusal(files.content(kept.id)))["status"] == 404
        assert (await refusal(files.delete(kept.id)))["status"] == 404


async def test_files_are_listed_page_by_page_in_either_order() -> None:
    async with api() as here:
        ids = [await here.upload(name=f"{n}.jsonl") for n in range(5)]
        page = await here.client.files.list(limit=2)
        assert ([file.id for file in page.data], page.has_more) == (ids[:2:-1], True)
        assert [file.id async for file in here.client.files.list(limit=2)] == ids[::-1]
        assert [file.id async for file in here.client.files.list(limit=3, order="asc")] == ids
        assert [file async for file in here.client.files.list(purpose="batch")] == []
        assert (await refusal(here.client.files.list(after="file-none")))["param"] == "after"
        assert (await refusal(here.client.files.list(limit=0)))["param"] == "limit"
        unknown = here.client.files.list(extra_query={"colour": "red"})
        assert (await refusal(unknown))["param"] == "colour"


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a\x00b", "..", "x" * 255])
async def test_a_name_is_never_a_path(name: str, tmp_path: Path) -> None:
    async with api(run_dir=tmp_path / "run") as here:
        file_id = await here.upload(name=name)
        assert (await here.client.files.content(file_id)).content == jsonl(*EXAMPLES)
        assert (await refusal(here.client.files.retrieve("..%2Ffiles%2F" + file_id)))["status"] == 404
    assert names_below(tmp_path) == {f"run/files/{file_id}.jsonl", f"run/files/{file_id}.json"}


async def test_what_is_no_jsonl_is_refused_at_once(tmp_path: Path) -> None:
    contents = (b"", b"\n \n", b"hello\n", b"[1, 2]\n", b"\xff\xfe", b'{"text": \n', b"id,text\n1,a\n")
    async with api(run_dir=tmp_path) as here:
        for content in contents:
            error = await refusal(here.upload(content))
            assert (error["status"], error["param"], error["code"]) == (400, "file", "invalid_file")
        assert [file async for file in here.client.files.list()] == []
    assert names_below(tmp_path) == set()


async def test_uploads_are_bounded_in_size_lines_and_number() -> None:
    line = b'{"text": "once upon a time"}\n'
    async with api(max_file_bytes=200_000, max_file_lines=5000, max_files=2) as here:
        assert (await refusal(here.upload(line * 8000)))["status"] == 413
        assert (await refusal(here.upload(line * 5001)))["code"] == "too_many_lines"
        assert (await refusal(here.upload(b"x" * 300_000)))["status"] == 413
        assert (await refusal(here.upload(line, name="x" * 256)))["status"] == 400
        for _ in range(2):  # what was refused took no place
            await here.upload(line)
        assert (await refusal(here.upload(line)))["code"] == "too_many_files"


async def test_an_upload_that_is_no_file_for_fine_tuning_is_refused_by_name() -> None:
    async with api() as here:
        files = here.client.files
        assert (await refusal(files.create(file=b"{}", purpose="batch")))["param"] == "purpose"
        expiring = files.create(
            file=b"{}", purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert "expires_after" in (await refusal(expiring))["param"]
        http = here.world.http
        for body in ({"data": {"purpose": "fine-tune"}}, {"json": {}}):
            assert (await http.post("/v1/files", **body)).status_code == 415
        assert (await http.post("/v1/files", files={"file": b"{}"})).status_code == 400
        text = {"data": {"purpose": "fine-tune", "file": "{}"}, "files": {"other": b""}}
        assert (await http.post("/v1/files", **text)).status_code == 400
        torn = await http.post(
            "/v1/files",
            content=b"--x\r\nnonsense",
            headers={"content-type": "multipart/form-data; boundary=x"},
        )
        assert torn.status_code == 400


@pytest.mark.parametrize(
    ("charset", "name", "status"),
    [
        ("utf-7", b"+2AA-", 400),
        ("unicode_escape", rb"\\ud800", 400),
        ("undefined", b"a", 400),
        ("utf-8; charset=utf-7", b"+2AA-", 400),
        ("UTF-8", "Übung".encode(), 200),
        ("utf-8", b"\xed\xa0\x80", 200),
    ],
)
async def test_names_of_files_are_text_whatever_charset_is_claimed(
    charset: str, name: bytes, status: int
) -> None:
    body = b"".join(
        b'--x\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % part
        for part in ((b"purpose", b"fine-tune"), (b'file"; filename="%b' % name, b'{"text": "once"}'))
    )
    headers = {"content-type": f"multipart/form-data; boundary=x; charset={charset}"}
    async with gateway_world() as world:
        kept = await world.http.post("/v1/files", content=body + b"--x--\r\n", headers=headers)
        assert kept.status_code == status
        assert (await world.http.get("/v1/files")).status_code == 200
    assert status == 200 or kept.json()["error"]["message"]


async def test_a_file_that_a_job_needs_is_not_deleted() -> None:
    async with api() as here:
        job = await here.create()
        assert (await refusal(here.client.files.delete(job.training_file)))["status"] == 409
        await here.client.fine_tuning.jobs.cancel(job.id)
        assert (await here.client.files.delete(job.training_file)).deleted


# Jobs


async def test_while_a_file_is_checked_streams_and_other_routes_go_on() -> None:
    tokenizer = BlockedTokenizer()
    async with api(script=says("All is well."), tokenizer=tokenizer) as here:
        job = await here.create(training_file=await here.upload(jsonl({"text": LONG})))
        await asyncio.to_thread(tokenizer.begun.wait, 20)

        stream = await here.client.completions.create(model=MODEL, prompt="Hi", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "All is well."
        assert (await here.job(job.id)).status == "validating_files"

        tokenizer.released.set()
        await here.until(job.id, "running")


async def test_a_job_trains_every_example_once_an_epoch_and_succeeds_when_all_is_durable() -> None:
    async with api() as here:
        job = await here.create(
            hyperparameters={"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5},
            seed=7,
            metadata={"team": "red"},
        )
        assert (job.status, job.object, job.model, job.seed) == (
            "validating_files",
            "fine_tuning.job",
            MODEL,
            7,
        )
        assert (job.fine_tuned_model, job.finished_at, job.error) == (None, None, None)
        assert job.metadata == {"team": "red"}
        here.trainer.allow(6)
        await here.until_applied(6)
        job = await here.until_shows(job.id, lambda job: job.lemix["lag"] == 0)
        assert (job.status, job.trained_tokens) == ("running", None), "nothing is durable yet"
        assert job.estimated_finish is not None
        await here.trainer.save()
        job = await here.until(job.id, "succeeded")
    assert (job.fine_tuned_model, job.error, job.estimated_finish) == (MODEL, None, None)
    assert job.finished_at is not None and job.trained_tokens is not None and job.trained_tokens > 100
    assert job.lemix == {
        "weights_version": {"first": 1, "last": 6},
        "lag": 0,
        "preemptions": 0,
        "slo_cost": {"late_requests": 0, "requests": 0},
    }
    assert here.trainer.applied == [f"{job.id}-e{e}-b{b:05}" for e in (1, 2) for b in (1, 2, 3)]
    bodies = here.trainer.bodies
    assert [len(body["examples"]) for body in bodies] == [4, 4, 2] * 2
    assert {body["learning_rate_multiplier"] for body in bodies} == {0.5}
    epochs = [
        [example for body in bodies[start : start + 3] for example in body["examples"]] for start in (0, 3)
    ]
    for epoch in epochs:
        assert sorted(epoch, key=str) == sorted(EXAMPLES, key=str)
    assert epochs[0] != epochs[1] != EXAMPLES, "each epoch is shuffled anew"


async def test_the_seed_decides_the_order() -> None:
    orders = []
    for seed in (1, 1, 2):
        async with api() as here:
            await here.create(hyperparameters={"n_epochs": 1, "batch_size": 5}, seed=seed)
            here.trainer.allow(2)
            await here.until_applied(2)
            orders.append([body["examples"] for body in here.trainer.bodies])
    assert orders[0] == orders[1] != orders[2]


async def test_hyperparameters_may_stand_in_the_method_or_be_left_out() -> None:
    hyperparameters = {"n_epochs": 1, "batch_size": 10, "learning_rate_multiplier": 2.0}
    async with api() as here:
        job = await here.create(
            method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
        )
        assert job.hyperparameters.model_dump() == hyperparameters
        assert job.method.supervised.hyperparameters.model_dump() == hyperparameters
        plain = await here.create(hyperparameters={"n_epochs": "auto"})
        assert plain.hyperparameters.model_dump() == {
            "n_epochs": 3,
            "batch_size": 8,
            "learning_rate_multiplier": 1.0,
        }
        assert 0 <= plain.seed < 2**31


def dpo(**hyperparameters: object) -> dict[str, Any]:
    return {"method": {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}}


@pytest.mark.parametrize(("asked", "beta"), [(0.5, 0.5), (1, 1.0), ("auto", 0.1), (None, 0.1)])
async def test_a_dpo_job_publishes_preferences_with_its_beta(asked: object, beta: float) -> None:
    hyperparameters = {"n_epochs": 1, "batch_size": 2}
    given = hyperparameters if asked is None else hyperparameters | {"beta": asked}
    async with api() as here:
        job = await here.create(training_file=await here.upload(jsonl(*PREFERENCES)), **dpo(**given))
        here.trainer.allow(2)
        await here.until_applied(2)
        await here.trainer.save()
        ended = await here.until(job.id, *TERMINAL)
    assert ended.status == "succeeded", ended.error
    told = {**hyperparameters, "learning_rate_multiplier": 0.2, "beta": beta}
    assert (ended.method.type, ended.method.supervised) == ("dpo", None)
    assert ended.method.dpo.hyperparameters.model_dump() == told
    bodies = [read_body(json.dumps(body).encode()) for body in here.trainer.bodies]
    assert [len(body.examples) for body in bodies] == [2, 1]
    assert {body.beta_of_preferences for body in bodies} == {beta}


@pytest.mark.parametrize(
    ("method", "lines", "reason"),
    [
        ("dpo", [PREFERENCES[0], EXAMPLES[0]], "line 2: is no preference"),
        ("supervised", [EXAMPLES[0], PREFERENCES[0]], "line 2: is a preference, which a supervised job"),
        ("dpo", [PREFERENCES[0] | {"preferred_output": []}], "line 1: preferred_output: List should have"),
    ],
)
async def test_a_line_that_the_method_cannot_learn_fails_the_job_by_its_number(
    method: str, lines: list[object], reason: str
) -> None:
    async with api() as here:
        job = await here.create(
            training_file=await here.upload(jsonl(*lines)), method=cast(Any, {"type": method})
        )
        failed = await here.until(job.id, *TERMINAL)
    assert (failed.status, failed.error.param) == ("failed", "training_file")
    assert reason in failed.error.message
    assert not here.trainer.bodies


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"validation_file": "file-1"}, "validation_file"),
    ({"suffix": "mine"}, "suffix"),
    ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations"),
    ({"method": {"type": "reinforcement"}}, "method.type"),
    ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo"),
    ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised"),
    ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}}, "method.dpo.hyperparameters.beta"),
    (
        {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 2.5}}}},
        "method.dpo.hyperparameters.beta",
    ),
    ({"method": {"type": "supervised"}, "hyperparameters": {}}, "hyperparameters"),
    ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
    ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs"),
    ({"hyperparameters": {"batch_size": 4097}}, "hyperparameters.batch_size"),
    ({"hyperparameters": {"batch_size": 1.5}}, "hyperparameters.batch_size"),
    ({"hyperparameters": {"learning_rate_multiplier": 0}}, "hyperparameters.learning_rate_multiplier"),
    ({"hyperparameters": {"learning_rate_multiplier": 1e7}}, "hyperparameters.learning_rate_multiplier"),
    ({"hyperparameters": {"beta": 1}}, "hyperparameters.beta"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**31}, "seed"),
    ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
    ({"metadata": {"k": 5}}, "metadata.k"),
    ({"metadata": {"k": "v" * 513}}, "metadata.k"),
    ({"training_file": "file-none"}, "training_file"),
    ({"extra_body": {"colour": "red"}}, "colour"),
]


async def test_a_parameter_that_cannot_be_honoured_is_refused_by_name() -> None:
    async with api() as here:
        for fields, param in REFUSED:
            error = await refusal(here.create(**fields))
            assert (error["status"], error["param"]) == (400, param)
        assert [job async for job in here.client.fine_tuning.jobs.list()] == []


async def test_another_model_than_the_served_one_does_not_exist() -> None:
    async with api() as here:
        error = await refusal(here.create(model="gpt-4o"))
    assert (error["status"], error["param"], error["code"]) == (404, "model", "model_not_found")


async def test_wrong_lines_fail_the_job_with_their_numbers_and_reasons() -> None:
    lines = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        {"messages": [{"role": "user"}]},
        {"prompt": "a"},
        {"text": "long " * 2000},
        {"messages": [{"role": "user", "content": "nobody answers"}]},
        {"colour": "red"},
    ]
    async with api() as here:
        content = jsonl(*lines[:2]) + b"\n\r\n" + jsonl(*lines[2:]) + b"no json\n"
        job = await here.create(training_file=await here.upload(content))
        job = await here.until(job.id, *TERMINAL)
        last = (await here.events(job.id))[-1]
    assert job.status == "failed" and job.finished_at is not None
    assert (job.error.code, job.error.param) == ("invalid_training_file", "training_file")
    for fault in (
        "line 2: messages.0: has neither content nor tool_calls",
        "line 5: completion: Field required",
        "line 6: has ",
        "line 7: has nothing to learn",
        "line 8: has none of the keys",
        "line 9: Invalid JSON",
    ):
        assert fault in job.error.message
    assert "line 1:" not in job.error.message
    assert (last.level, last.message) == ("error", job.error.message)
    assert here.trainer.bodies == []


async def test_chat_examples_are_passed_on_as_they_are() -> None:
    chat = {"messages": [{"role": "user", "content": "hi ü"}, {"role": "assistant", "content": "ho 😀"}]}
    async with api() as here:
        content = json.dumps(chat, ensure_ascii=False).encode()
        await here.create(training_file=await here.upload(content), hyperparameters={"n_epochs": 1})
        here.trainer.allow(1)
        await here.until_applied(1)
    assert here.trainer.bodies[0]["examples"] == [chat]


async def test_batches_that_no_message_could_hold_fail_the_job_before_it_trains() -> None:
    async with api(max_microbatch_tokens=64) as here:
        padded = (b'{"token_ids": [1, 2]' + b" " * 400_000 + b"}\n") * 3
        job = await here.create(
            training_file=await here.upload(padded), hyperparameters={"batch_size": 3, "n_epochs": 1}
        )
        job = await here.until(job.id, *TERMINAL)
    assert (job.status, job.error.code) == ("failed", "batch_too_large")


async def test_events_and_checkpoints_tell_the_story_page_by_page() -> None:
    async with api() as here:
        job = await here.create(hyperparameters={"n_epochs": 1, "batch_size": 5})
        here.trainer.allow(1)
        await here.until_shows(job.id, lambda job: job.lemix["weights_version"]["last"] == 1)
        await here.trainer.save()
        here.trainer.allow(1)
        await here.until_shows(job.id, lambda job: job.lemix["weights_version"]["last"] == 2)
        await here.trainer.save()
        await here.until(job.id, "succeeded")
        events = await here.events(job.id)
        jobs = here.client.fine_tuning.jobs
        paged = [event async for event in jobs.list_events(job.id, limit=2)]
        page = await jobs.checkpoints.list(job.id, limit=1)
        checkpoints = [checkpoint async for checkpoint in jobs.checkpoints.list(job.id, limit=1)]
    assert [event.message.split(":")[0] for event in events] == [
        "Created fine-tuning job",
        "Validating training file",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "Step 1/2",
        "Checkpoint created at step 1",
        "Step 2/2",
        "Checkpoint created at step 2",
        "The job has successfully completed",
    ]
    assert len({event.id for event in events}) == len(events)
    assert paged[::-1] == events
    metrics = [event.data for event in events if event.type == "metrics"]
    assert metrics == [
        {"step": 1, "train_loss": 2.0, "total_steps": 2},
        {"step": 2, "train_loss": 1.0, "total_steps": 2},
    ]
    assert page.has_more and len(page.data) == 1
    assert [checkpoint.step_number for checkpoint in checkpoints] == [2, 1]
    assert checkpoints[0].fine_tuned_model_checkpoint == f"{MODEL}:weights-2"
    assert checkpoints[0].fine_tuning_job_id == job.id
    assert (checkpoints[1].metrics.step, checkpoints[1].metrics.train_loss) == (1, 2.0)


def verdict_on(version: int, **fields: Any) -> JudgedVersion:
    """A guard's verdict of now."""
    return JudgedVersion(version=version, judged_wall_s=time.time(), **fields)


async def durable_under_a_guard(here: Api) -> Any:
    """A job whose one step is durable as version 1, which the guard has yet to judge."""
    here.trainer.judge(published=0)
    job = await here.create(hyperparameters={"n_epochs": 1, "batch_size": 10})
    here.trainer.allow(1)
    await here.until_applied(1)
    await here.trainer.save()
    await here.until_checkpoint(job.id)
    return job


async def test_a_job_succeeds_when_the_guard_lets_what_it_taught_serve() -> None:
    losses = {"training_loss": 2.0, "held_out_loss": 1.5, "samples_loss": 0.5}
    async with api() as here:
        job = await durable_under_a_guard(here)
        assert (await here.job(job.id)).status == "running", "durable, and not judged"
        here.trainer.judge(verdict_on(1, **losses), published=1)
        job = await here.until(job.id, *TERMINAL)
        saved: Any = (await here.client.fine_tuning.jobs.checkpoints.list(job.id)).data[0]
        events = await here.events(job.id)
    assert (job.status, job.fine_tuned_model) == ("succeeded", MODEL)
    assert saved.metrics.full_valid_loss == 1.5 and saved.metrics.train_loss == 2.0
    assert saved.metrics.samples_loss == 0.5
    assert saved.lemix == {"node": NODE, "weights_version": 1, "why_withheld": ""}
    assert events[-2].message == "Version 1 is served"
    assert events[-2].data == {
        "weights_version": 1,
        "train_loss": 2.0,
        "full_valid_loss": 1.5,
        "samples_loss": 0.5,
    }


async def test_a_job_fails_when_the_guard_withholds_what_it_taught_also_after_a_restart(
    tmp_path: Path,
) -> None:
    broker = MemoryBroker()
    trainer = FakeTrainer(broker.connect())
    running = asyncio.create_task(trainer.run())
    async with api(broker, trainer, run_dir=tmp_path) as here:
        job = await durable_under_a_guard(here)
    trainer.judge(verdict_on(1, why_withheld="held-out loss 9 is above 1"), published=0)
    async with api(broker, trainer, run_dir=tmp_path, seed=1) as here:
        job = await here.until(job.id, *TERMINAL)
        events = await here.events(job.id)
    running.cancel()
    await asyncio.wait([running])
    assert (job.status, job.fine_tuned_model, job.error.code) == ("failed", None, "withheld_by_guard")
    assert "held-out loss 9 is above 1" in job.error.message
    assert [event.level for event in events[-2:]] == ["warn", "error"]


async def test_jobs_are_listed_page_by_page_and_by_metadata() -> None:
    async with api() as here:
        file_id = await here.upload()
        jobs, ids = here.client.fine_tuning.jobs, []
        for n in range(5):
            metadata = {"metadata": {"parity": "odd"}} if n % 2 else {}
            ids.append((await here.create(training_file=file_id, **metadata)).id)
        assert [job.id async for job in jobs.list(limit=2)] == ids[::-1]
        assert [job.id async for job in jobs.list(metadata={"parity": "odd"})] == [ids[3], ids[1]]
        assert [job.id async for job in jobs.list(metadata={"parity": "even"})] == []
        none = jobs.list(extra_query={"metadata": "null"})
        assert [job.id async for job in none] == [ids[4], ids[2], ids[0]]
        assert (await refusal(jobs.list(after="ftjob-none")))["param"] == "after"
        assert (await refusal(jobs.list(limit=101)))["param"] == "limit"


async def test_what_there_is_not_is_404() -> None:
    async with api() as here:
        jobs = here.client.fine_tuning.jobs
        for request in (
            jobs.retrieve("ftjob-1"),
            jobs.cancel("ftjob-1"),
            jobs.list_events("ftjob-1"),
            jobs.checkpoints.list("ftjob-1"),
        ):
            assert (await refusal(request))["status"] == 404


async def test_a_cancelled_job_publishes_nothing_more_and_what_it_published_is_counted() -> None:
    async with api(max_batches_ahead=3) as here:
        job = await here.create(hyperparameters={"n_epochs": 5, "batch_size": 1})
        here.trainer.allow(2)
        job = await here.until_shows(
            job.id, lambda job: job.lemix["weights_version"]["last"] == 2 and job.lemix["lag"] == 3
        )
        job = cast(Any, await here.client.fine_tuning.jobs.cancel(job.id))
        assert (job.status, job.lemix["lag"]) == ("cancelled", 3)
        assert job.finished_at is not None
        here.trainer.allow(100)
        job = await here.until_shows(job.id, lambda job: job.lemix["lag"] == 0)
        assert (job.status, job.lemix["weights_version"]) == ("cancelled", {"first": 1, "last": 5})
        assert (await refusal(here.client.fine_tuning.jobs.cancel(job.id)))["status"] == 400
    assert len(here.trainer.applied) == 5


async def test_a_rejected_batch_fails_its_job() -> None:
    async with api() as here:
        here.trainer.poison = "-e1-b00002"
        here.trainer.allow(10)
        job = await here.create(hyperparameters={"n_epochs": 1, "batch_size": 5})
        job = await here.until(job.id, *TERMINAL)
    assert (job.status, job.error.code) == ("failed", "batch_rejected")
    assert job.error.message == "Step 2 was rejected: NaN"


@pytest.mark.parametrize("is_lost", [False, True])
async def test_a_job_whose_durable_step_is_taken_out_of_the_weights_fails(is_lost: bool) -> None:
    """The job hears of it, or finds out when it asks."""
    async with api(ask_after_s=0.05) as here:
        here.trainer.allow(1)
        job = await here.create(hyperparameters={"n_epochs": 1, "batch_size": 5})
        await here.until_applied(1)
        await here.trainer.save()
        await here.until_checkpoint(job.id)
        here.trainer.is_mute = is_lost
        await here.trainer.roll_back()
        here.trainer.allow(1)
        job = await here.until(job.id, *TERMINAL)
    assert (job.status, job.error.code) == ("failed", "step_discarded")
    assert job.error.message == "Step 1, which was durable, is in the weights no longer: NaN"


async def test_jobs_wait_for_their_turn_and_their_number_is_bounded() -> None:
    async with api(max_jobs=3) as here:
        file_id = await here.upload()
        small: dict[str, Any] = {
            "training_file": file_id,
            "hyperparameters": {"n_epochs": 1, "batch_size": 10},
        }
        first, second, third = [await here.create(**small) for _ in range(3)]
        await here.until(first.id, "running")
        await here.until(third.id, "queued")
        assert (await refusal(here.create(**small)))["status"] == 429
        here.trainer.allow(1)
        await here.until_applied(1)
        assert (await here.job(second.id)).status == "queued"
        await here.trainer.save()
        await here.until(first.id, "succeeded")
        await here.until(second.id, "running")
        fourth = await here.create(**small)
        assert (await refusal(here.client.fine_tuning.jobs.retrieve(first.id)))["status"] == 404
        assert (await here.job(fourth.id)).id == fourth.id


# Lost messages and restarts


async def test_a_job_ends_although_every_message_of_the_trainer_is_lost() -> None:
    async with api(ask_after_s=0.05) as here:
        here.trainer.is_mute = True
        here.trainer.allow(4)
        job = await here.create(hyperparameters={"n_epochs": 2, "batch_size": 5})
        await here.until_applied(4)
        job = await here.until_shows(job.id, lambda job: job.lemix["weights_version"]["last"] == 4)
        await here.trainer.save()
        job = await here.until(job.id, *TERMINAL)
    assert job.status == "succeeded"


async def test_a_rejection_that_was_lost_fails_the_job_all_the_same() -> None:
    async with api(ask_after_s=0.05) as here:
        here.trainer.is_mute, here.trainer.poison = True, "b00001"
        here.trainer.allow(4)
        job = await here.create(hyperparameters={"n_epochs": 1, "batch_size": 5})
        job = await here.until(job.id, *TERMINAL)
    assert job.error.code == "batch_rejected"


async def test_a_batch_that_the_trainer_lost_is_published_again() -> None:
    broker = MemoryBroker()
    async with api(broker, ask_after_s=0.05) as here:
        job = await here.create(hyperparameters={"n_epochs": 1, "batch_size": 10})
        await here.until_shows(job.id, lambda job: job.lemix["lag"] == 1)
        here.trainer.allow(1)
        await here.until_applied(1)
        (batch_id,) = here.trainer.applied
        # As if it had been stored where the trainer has passed by, and was never seen.
        here.trainer.applied.clear()
        here.trainer.bodies.clear()
        stream = broker.streams["LEMIX_TRAIN"]
        stream._sequence_by_id.clear()
        here.trainer.num_read = stream.last_sequence
        here.trainer.allow(1)
        await here.until_applied(1)
        assert here.trainer.applied == [batch_id]
        assert stream.last_sequence == 2


@pytest.mark.parametrize("after", [0, 1, 4, 7, 11])
async def test_a_gateway_that_is_restarted_goes_on_and_each_batch_is_applied_once(
    after: int, tmp_path: Path
) -> None:
    broker = MemoryBroker()
    trainer = FakeTrainer(broker.connect())
    running = asyncio.create_task(trainer.run())
    options: dict[str, Any] = {"run_dir": tmp_path, "max_batches_ahead": 3, "ask_after_s": 0.05}
    async with api(broker, trainer, **options) as here:
        job = await here.create(hyperparameters={"n_epochs": 2, "batch_size": 1}, metadata={"a": "b"})
        await here.until(job.id, "running")
        trainer.allow(after)
        await here.until_applied(after)
        before = await here.job(job.id)
        if after > 4:
            await trainer.save()
    stream = broker.streams["LEMIX_TRAIN"]
    stream._sequence_by_id.clear()  # the server's window for repetitions is over
    trainer.allow(100)
    async with api(broker, trainer, seed=1, **options) as here:
        await here.until_applied(20)
        await trainer.save()
        job = await here.until(job.id, *TERMINAL)
        events = await here.events(job.id)
    running.cancel()
    await asyncio.wait([running])
    assert job.status == "succeeded"
    assert (job.created_at, job.metadata, job.seed) == (before.created_at, before.metadata, before.seed)
    expected = [f"{job.id}-e{epoch}-b{batch:05}" for epoch in (1, 2) for batch in range(1, 11)]
    assert trainer.applied == expected
    assert [body["id"] for body in trainer.bodies] == expected
    steps = [event.data["step"] for event in events if event.type == "metrics"]
    assert len(set(steps)) == len(steps), "no step is told of twice"
    assert [event.message for event in events].count("Fine-tuning job started") == 1


async def test_files_outlive_the_gateway(tmp_path: Path) -> None:
    async with api(run_dir=tmp_path) as here:
        file_id = await here.upload()
        (tmp_path / "files" / "file-torn.jsonl").write_bytes(b"{")
    async with api(run_dir=tmp_path, seed=1) as here:
        assert [file.id async for file in here.client.files.list()] == [file_id]
        assert (await here.client.files.content(file_id)).content == jsonl(*EXAMPLES)
    assert not (tmp_path / "files" / "file-torn.jsonl").exists()


# What a job costs the requests


@pytest.mark.parametrize(("slo_s", "is_late"), [(1e-9, True), (1000.0, False)])
async def test_requests_answered_beside_a_jobs_batch_count_and_late_ones_are_its_cost(
    slo_s: float, is_late: bool
) -> None:
    async with api(script=says("x")) as here:
        here.world.cluster.slo_s = slo_s
        here.trainer.defers = True
        complete = here.client.completions.create
        await complete(model=MODEL, prompt="before")
        job = await here.create(hyperparameters={"n_epochs": 1, "batch_size": 10})
        await here.until_shows(job.id, lambda job: job.lemix["preemptions"] == 1)
        await here.until_shows(job.id, lambda job: job.lemix["lag"] == 1)

        async def counted(num_requests: int) -> Any:
            return await here.until_shows(
                job.id, lambda job: job.lemix["slo_cost"]["requests"] >= num_requests
            )

        while (await here.job(job.id)).lemix["slo_cost"]["requests"] == 0:
            await complete(model=MODEL, prompt="until the objective is known")
        num_before = (await here.job(job.id)).lemix["slo_cost"]["requests"]
        await complete(model=MODEL, prompt="beside", n=3)
        job = await counted(num_before + 1)
        here.trainer.allow(1)
        job = await here.until_shows(job.id, lambda job: job.lemix["lag"] == 0)
        await complete(model=MODEL, prompt="after")
        job = await here.job(job.id)
    cost = job.lemix["slo_cost"]
    assert cost["requests"] == num_before + 1, "a request counts once, and only beside a batch"
    assert cost["late_requests"] == (cost["requests"] if is_late else 0)
