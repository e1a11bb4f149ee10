"""A node that serves and trains at once, and what must not disturb it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

from services.stage_worker.pipeline.disciplines import WorkKind
from services.stage_worker.training import training
from shared import subjects
from shared.bus.base import Incoming
from shared.errors import RefusedError
from shared.messages.base import Done, Message
from shared.messages.cluster import LinkOffer
from shared.messages.inference import CancelTask, InferenceTask, IterationForward, Sampling, TaskEnded
from shared.messages.training import (
    BatchReady,
    BatchStepped,
    MicrobatchForward,
    SaveFailed,
    ShardSaved,
    StageReport,
    StepDone,
    TrainingFailed,
)
from shared.subjects import RequestSubject, Subject
from tests.support.models import VOCAB_SIZE, save_tiny_model
from tests.support.node import Answer, Node, running_node
from tests.support.reference import greedy_reference
from tests.support.saving import save, tensors_in
from tests.support.training import ADAMW, Batch, messages, random_batches
from tests.support.waiting import until

PROMPT = [3, 14, 15, 92, 65, 35]
ENDLESS: dict[str, Any] = {"max_tokens": 3000}
"""Far more tokens than come before the test ends."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny_model("llama", path)
    return path


def prompt(number: int) -> list[int]:
    generator = torch.Generator().manual_seed(number)
    tokens: list[int] = torch.randint(VOCAB_SIZE, (5 + 6 * number,), generator=generator).tolist()
    return tokens


async def feed(node: Node, batch_id: str, batch: Batch, *, fence: int = 1, **header: Any) -> None:
    for message in messages(batch_id, batch, fence=fence, **header):
        await node.feed(message)


async def step(node: Node, batch_id: str, batch: Batch, **header: Any) -> list[StageReport]:
    """Train on a batch; returns all reports until every stage has stepped."""
    await feed(node, batch_id, batch, **header)
    reports: list[StageReport] = []
    while not (reports and isinstance(reports[-1].event, BatchStepped)):
        reports.append(await node.report())
        assert not isinstance(reports[-1].event, TrainingFailed), reports[-1]
    return reports


@asynccontextmanager
async def training_all_the_time(node: Node) -> AsyncIterator[list[StageReport]]:
    """Training at learning rate 0 goes on behind the body; gives the reports so far."""
    reports: list[StageReport] = []

    async def train() -> None:
        node.learning_rate, number = 0.0, 0
        while True:
            for batch in random_batches(4, 2, seed=number):
                reports.extend(await step(node, f"b{number}", batch))
                number += 1

    async with asyncio.TaskGroup() as group:
        training = group.create_task(train())
        yield reports
        training.cancel()


async def complete(node: Node, reports: list[StageReport], number: int) -> tuple[Answer, int]:
    """An answer, with how many training reports came between its first and its last token."""
    answer = await node.start(prompt(number), max_tokens=40, num_logprobs=1, prompt_logprobs=True)
    await answer.first_token()
    num_before = len(reports)
    await answer.end()
    return answer, len(reports) - num_before


@pytest.mark.parametrize("num_stages", [1, 2, 3])
async def test_answers_equal_transformers_while_training_runs(num_stages: int, tmp_path: Path) -> None:
    model = save_tiny_model("llama_tied", tmp_path / "model")
    busy = {"training_patience_s": 0.0, "max_iteration_tokens": 16}
    async with running_node(tmp_path / "model", num_stages, tmp_path, **busy) as node:
        await node.restore()
        async with training_all_the_time(node) as reports:
            answers = await asyncio.gather(*(complete(node, reports, number) for number in range(4)))
    for number, (answer, num_reports) in enumerate(answers):
        tokens, logprobs = greedy_reference(model, prompt(number), 40)
        assert answer.token_ids == tokens
        told = [token.logprob for token in (*answer.prompt, *answer.tokens)]
        assert told == pytest.approx(logprobs, abs=1e-4)
        assert num_reports > 0
        assert answer.versions[-1] > answer.versions[0], "no step came between two tokens"


async def test_sampled_answers_depend_on_their_seed_only(folder: Path, tmp_path: Path) -> None:
    sampled = {"max_tokens": 12, "temperature": 1.2, "top_p": 0.9}
    async with running_node(folder, 2, tmp_path, max_iteration_tokens=16) as node:
        alone = await node.complete(PROMPT, seed=5, **sampled)
        company = [node.complete(prompt(number), seed=number, **sampled) for number in range(5)]
        again, *_ = await asyncio.gather(node.complete(PROMPT, seed=5, **sampled), *company)
        other = await node.complete(PROMPT, seed=6, **sampled)
    assert again.token_ids == alone.token_ids
    assert other.token_ids != alone.token_ids


async def test_a_cancel_frees_all_blocks(folder: Path, tmp_path: Path) -> None:
    """A request alone is cancelled, one that shares its beginning, and one that waits for room to begin."""
    all_but_one = (PROMPT * 510)[: 3072 - 16]
    async with running_node(folder, 2, tmp_path, kv_tokens=3072) as node:
        answer = await node.start(PROMPT * 6, **ENDLESS)
        await answer.first_token()
        sharing = await node.start(PROMPT * 6, **ENDLESS)
        await sharing.first_token()
        assert (answer.num_cached, sharing.num_cached) == (0, 32)
        waiting = await node.start(all_but_one, max_tokens=1)
        await node.heard(lambda: (node.heartbeats[0].running, node.heartbeats[0].waiting) == (2, 1))
        for each in (waiting, sharing, answer):
            await node.cancel(each)
        node.heartbeats.clear()
        await node.heard(lambda: 0 in node.heartbeats and node.heartbeats[0].kv_blocks_used == 0)
        assert node.heartbeats[0].running == node.heartbeats[0].waiting == 0
        assert not any(each.done.is_set() for each in (answer, sharing, waiting))
        assert waiting.tokens == []
        assert (await node.complete(all_but_one, max_tokens=16)).finish == "length", "it needs every block"


async def test_a_cancel_may_come_before_its_request(folder: Path, tmp_path: Path) -> None:
    async with running_node(folder, 2, tmp_path) as node:
        ended: asyncio.Queue[TaskEnded] = asyncio.Queue()

        async def on_ended(incoming: Incoming[TaskEnded]) -> None:
            ended.put_nowait(incoming.message)

        await node.bus.subscribe(subjects.ENDED.at(), on_ended)
        await node.bus.publish(subjects.CANCEL.at(node=0), CancelTask(task_id="task-0"))
        early = await node.start(PROMPT, **ENDLESS)
        assert early.task.task_id == "task-0"
        assert await ended.get() == TaskEnded(task_ids=("task-0",))
        assert (await node.complete(PROMPT, max_tokens=4)).finish == "length"
        assert (early.tokens, early.failure) == ([], None)


async def test_an_expired_request_fails_with_504(folder: Path, tmp_path: Path) -> None:
    async with running_node(folder, 2, tmp_path) as node:
        late = await node.complete(PROMPT, timeout_s=0.01, **ENDLESS)
        assert late.failure is not None
        assert (late.failure.code, late.failure.reason) == (504, "not finished within its 0.01 s")
        assert (await node.complete(PROMPT, max_tokens=2)).finish == "length"


async def test_a_request_that_can_never_fit_fails_with_400(folder: Path, tmp_path: Path) -> None:
    async with running_node(folder, 2, tmp_path, kv_tokens=64) as node:
        for bad_prompt in (PROMPT * 20, []):
            refused = await node.complete(bad_prompt, max_tokens=1)
            assert refused.failure is not None
            assert refused.failure.code == 400
        assert (await node.complete(PROMPT, max_tokens=2)).finish == "length"


async def test_a_request_that_comes_twice_is_answered_once(folder: Path, tmp_path: Path) -> None:
    async with running_node(folder, 2, tmp_path) as node:
        expected = await node.complete(PROMPT, max_tokens=8)
        answer = await node.start(PROMPT, max_tokens=8)
        await node.bus.publish(subjects.ASSIGN.at(node=0), answer.task)
        await answer.end()
        assert (await node.complete(PROMPT, max_tokens=8)).token_ids == expected.token_ids
    assert answer.token_ids == expected.token_ids


class Garbage(Message):
    """Bytes that are no MessagePack."""

    def pack(self) -> bytes:
        return b"\xc1 no message"


class OthersTask(InferenceTask):
    """A request of another process: the memory bus packs and unpacks what is not of its own type."""


def subjects_of(stage: int) -> tuple[list[str], list[str]]:
    """Names of what a stage of two listens to, and of what it answers."""
    place = {"node": 0, "stage": stage}
    told = [
        topic.at(**place).name
        for topic in (subjects.FORWARD, subjects.BACKWARD, subjects.STEP, subjects.TIED)
    ]
    if stage == 0:
        told += [
            topic.at(**place).name
            for topic in (
                subjects.ASSIGN,
                subjects.CANCEL,
                subjects.ITERATION_DONE,
                subjects.STEP_AHEAD,
                subjects.TRAINED,
            )
        ]
    else:
        told.append(subjects.ITERATION.at(**place).name)
    asked = [topic.at(**place).name for topic in (subjects.LINK, subjects.RESTORE, subjects.SAVE)]
    return told, asked


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": (3, VOCAB_SIZE)}, f"the model's tokens are 0 to {VOCAB_SIZE - 1}"),
        ({"prompt": (3, -1)}, f"the model's tokens are 0 to {VOCAB_SIZE - 1}"),
        (
            {"sampling": Sampling(max_tokens=4095)},
            "prompt and max_tokens make 4101 tokens; the model reads 4096",
        ),
    ],
)
async def test_a_senseless_request_fails_clearly(
    change: dict[str, Any], reason: str, folder: Path, tmp_path: Path
) -> None:
    async with running_node(folder, 2, tmp_path) as node:
        refused = await node.start(PROMPT, max_tokens=4, changes=change)
        await refused.end()
        assert refused.failure is not None
        assert (refused.failure.code, refused.failure.reason) == (400, reason)
        assert (await node.complete(PROMPT, max_tokens=2)).finish == "length"


async def test_what_no_request_can_be_is_dropped_and_counted(folder: Path, tmp_path: Path) -> None:
    async with running_node(folder, 2, tmp_path) as node:
        answer = await node.complete(PROMPT, max_tokens=2)
        bad = OthersTask(**structs.asdict(answer.task) | {"timeout_s": -1.0})
        await node.bus.publish(Subject(subjects.ASSIGN.at(node=0).name, OthersTask), bad)
        assert (await node.complete(PROMPT, max_tokens=2)).finish == "length"
        assert node.workers.buses[0].num_malformed == 1


SENSELESS_REFS: list[dict[str, Any]] = [
    {"slot": 10**6},
    {"size_bytes": 10**6},
    {"shape": (10**6, 32)},
    {"shape": (-1, -32)},
    {"shape": (4, 8)},
    {"dtype": "int64", "shape": (1, 16)},
    {"carrier": "inline"},
    {"place": "nowhere"},
]


@pytest.mark.parametrize("change", SENSELESS_REFS)
async def test_senseless_activations_cost_an_iteration_and_no_more(
    change: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    async with running_node(folder, 2, tmp_path) as node:
        place = subjects.ITERATION.at(node=0, stage=1)
        seen: list[IterationForward] = []

        async def on_iteration(incoming: Incoming[IterationForward]) -> None:
            seen.append(incoming.message)

        await node.bus.subscribe(place, on_iteration)
        expected = await node.complete(PROMPT, max_tokens=2)
        last = seen[-1]
        hidden = structs.replace(last.hidden, generation=last.hidden.generation, **change)
        other = structs.replace(last.iteration, number=10**6)
        await node.bus.publish(place, IterationForward(iteration=other, hidden=hidden))
        assert (await node.complete(PROMPT, max_tokens=2)).token_ids == expected.token_ids


@pytest.mark.parametrize("bad", [Garbage(), StepDone(batch_id="b", version=1)])
async def test_malformed_messages_are_counted_and_nothing_else_breaks(bad: Message, tmp_path: Path) -> None:
    save_tiny_model("llama_tied", tmp_path / "model")
    async with running_node(tmp_path / "model", 2, tmp_path, **ADAMW) as node:
        await node.restore()
        expected = await node.complete(PROMPT, max_tokens=4)
        for stage in range(2):
            told, asked = subjects_of(stage)
            for name in told:
                await node.bus.publish(Subject(name, type(bad)), bad)
            for name in asked:
                with pytest.raises(RefusedError) as refusal:
                    await node.bus.request(RequestSubject(name, type(bad), Done), bad, timeout_s=5.0)
                assert refusal.value.code == 400
        await node.bus.publish(Subject(subjects.NEIGHBOUR.at(node=0).name, type(bad)), bad)
        assert (await node.complete(PROMPT, max_tokens=4)).token_ids == expected.token_ids
        await step(node, "b0", random_batches(1, 2)[0])
        for stage, bus in node.workers.buses.items():
            assert bus.num_malformed == sum(map(len, subjects_of(stage))) + 1


async def test_microbatches_of_an_older_fence_are_ignored(folder: Path, tmp_path: Path) -> None:
    old, new = random_batches(2, 2)
    async with running_node(folder, 2, tmp_path, **ADAMW) as node:
        await node.restore(fence=2)
        await feed(node, "old", old, fence=1)
        reports = await step(node, "new", new, fence=2)
        assert {report.fence for report in reports} == {2}
        assert {report.event.batch_id for report in reports} == {"new"}  # type: ignore[union-attr]
        with pytest.raises(RefusedError, match="fence 1 is over") as refusal:
            await node.restore(fence=1)
        assert refusal.value.code == 409
        reports = await step(node, "newer", old, fence=2)
    versions = {report.event.version for report in reports if isinstance(report.event, BatchStepped)}
    assert versions == {2}


def losses(reports: list[StageReport]) -> list[float]:
    """The losses of the batches that were stepped on."""
    return [report.event.loss for report in reports if isinstance(report.event, BatchStepped)]


def has_run(node: Node, batch_id: str, num_forwards: int) -> bool:
    return sum(name == batch_id for _, name, _ in node.versions) >= num_forwards


async def test_restores_in_mid_flight_leave_nothing_behind(tmp_path: Path) -> None:
    """More of them than an arena has slots: what is dropped must give its slot back."""
    save_tiny_model("llama_tied", tmp_path / "model")
    (batch,) = random_batches(1, 3)
    num_restores = 12
    async with running_node(tmp_path / "model", 2, tmp_path, **ADAMW) as node:
        await node.restore()
        (expected,) = losses(await step(node, "e1", batch[:1], fence=1))
        for fence in range(2, 2 + num_restores):
            await feed(node, f"e{fence - 1}", batch, fence=fence - 1)
            await until(partial(has_run, node, f"e{fence - 1}", fence % 4))
            await node.restore(fence=fence)
        while not node.reports.empty():
            report = await node.report()
            assert report.event.batch_id == f"e{report.fence}"  # type: ignore[union-attr]
        await node.complete(PROMPT, max_tokens=4)
        reports = await step(node, "last", batch[:1], fence=fence)
    assert {report.fence for report in reports} == {fence}
    (loss,) = losses(reports)
    assert loss == pytest.approx(expected, abs=1e-6)


def with_bad_token(batch: Batch) -> list[MicrobatchForward]:
    first, *others = messages("bad", batch)
    return [structs.replace(first, tokens=(VOCAB_SIZE, *first.tokens[1:])), *others]


async def test_a_batch_that_raises_fails_alone(folder: Path, tmp_path: Path) -> None:
    good, bad = random_batches(2, 1)
    async with running_node(folder, 2, tmp_path, **ADAMW) as node:
        await node.restore()
        expected = await node.complete(PROMPT, max_tokens=20)
        answer = await node.start(PROMPT, max_tokens=20)
        for message in with_bad_token(bad):
            await node.feed(message)
        failure = (await node.report()).event
        assert isinstance(failure, TrainingFailed)
        assert failure.batch_id == "bad"
        assert failure.reason.startswith("LemixError: tokens ")
        assert failure.reason.endswith(f" to {VOCAB_SIZE} are not all in 0..{VOCAB_SIZE - 1}")
        await answer.end()
        await node.restore(fence=2)
        reports = await step(node, "good", good, fence=2)
        assert {report.event.version for report in reports if isinstance(report.event, BatchStepped)} == {1}
    assert answer.token_ids == expected.token_ids


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama_tied", {}),
        ("llama_tied", {"dtype": "bfloat16", "activation_checkpointing": True}),
        ("llama", {"optimizer": "nadamw"}),
    ],
)
async def test_a_restored_node_goes_on_as_if_nothing_had_been(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    save_tiny_model(family, model)
    batches = random_batches(4, 2)
    async with running_node(model, 2, tmp_path, **ADAMW | settings) as node:
        node.learning_rate = 0.05
        await node.restore()
        for number in (0, 1):
            await step(node, f"b{number}", batches[number])
        before = await node.complete(PROMPT, max_tokens=16, num_logprobs=0)
        checkpoint = await save(node, model, 2, tmp_path / "checkpoints" / "saved")
        for number in (2, 3):
            await step(node, f"b{number}", batches[number])
        undisturbed = tensors_in(await save(node, model, 4, tmp_path / "checkpoints" / "undisturbed"))
        changed = await node.complete(PROMPT, max_tokens=16, num_logprobs=0)

        await node.restore(fence=2, version=2, checkpoint=str(checkpoint))
        after = await node.complete(PROMPT, max_tokens=16, num_logprobs=0)
        for number in (2, 3):
            await step(node, f"b{number}", batches[number], fence=2)
        disturbed = tensors_in(await save(node, model, 4, tmp_path / "checkpoints" / "disturbed", fence=2))
    assert after.token_ids == before.token_ids
    logprobs = [token.logprob for token in before.tokens]
    assert [token.logprob for token in after.tokens] == pytest.approx(logprobs, abs=1e-5)
    assert [token.logprob for token in changed.tokens] != pytest.approx(logprobs, abs=1e-5)
    assert set(after.versions) == {2}
    assert disturbed.keys() == undisturbed.keys()
    for name, tensor in undisturbed.items():
        assert torch.equal(disturbed[name], tensor), name


async def test_a_version_that_is_gone_cannot_be_saved(folder: Path, tmp_path: Path) -> None:
    async with running_node(folder, 1, tmp_path, **ADAMW) as node:
        await node.restore()
        await step(node, "b0", random_batches(1, 1)[0])
        with pytest.raises(RefusedError, match="version 0 is gone, this stage holds 1") as refusal:
            await node.save(0, tmp_path / "checkpoints")
        assert refusal.value.code == 409


async def saved_version(node: Node) -> int:
    event = (await node.next(ShardSaved)).event
    assert isinstance(event, ShardSaved)
    return event.version


async def test_a_save_of_the_present_version_takes_the_place_of_one_that_has_not_come(
    folder: Path, tmp_path: Path
) -> None:
    root = tmp_path / "checkpoints"
    folders = {version: root / str(version) for version in (0, 1, 2)}
    for each in folders.values():
        each.mkdir(parents=True)
    async with running_node(folder, 1, tmp_path, **ADAMW) as node:
        await node.restore()
        await node.save(1, folders[1])
        await node.save(0, folders[0])
        assert await saved_version(node) == 0
        await step(node, "b0", random_batches(1, 1)[0])
        await node.save(2, folders[2])
        await step(node, "b1", random_batches(1, 1)[0])
        assert await saved_version(node) == 2
    assert not list(folders[1].iterdir())


async def test_a_save_that_a_step_overtakes_is_told_as_failed(folder: Path, tmp_path: Path) -> None:
    async with running_node(folder, 1, tmp_path, discipline="fifo", **ADAMW) as node:
        await node.restore()
        node.orders_steps = False
        await feed(node, "b0", *random_batches(1, 1))
        ready, gate = await node.next(BatchReady), asyncio.Event()

        async def wait() -> None:
            await gate.wait()

        # The step waits behind this, and the save behind the step.
        node.workers.workers[0]._queue.put(WorkKind.CONTROL, wait)
        await node.order(ready.fence, "b0")
        await node.save(0, tmp_path / "checkpoints")
        gate.set()
        stepped, failed = [(await node.report()).event for _ in range(2)]
    assert isinstance(stepped, BatchStepped) and stepped.version == 1
    assert failed == SaveFailed(version=0, reason="the stage has gone on to version 1")


async def test_a_checkpoint_that_cannot_be_written_is_told_and_no_more(folder: Path, tmp_path: Path) -> None:
    async with running_node(folder, 2, tmp_path, **ADAMW) as node:
        await node.restore()
        await node.save(0, tmp_path / "checkpoints" / "missing")
        for _ in range(2):
            event = (await node.report()).event
            assert isinstance(event, SaveFailed)
            assert event.version == 0
        await step(node, "b0", random_batches(1, 1)[0])
        assert (await node.complete(PROMPT, max_tokens=2)).finish == "length"


async def test_messages_lead_to_no_files_outside_the_run(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "checkpoints" / ".." / "elsewhere"
    async with running_node(folder, 2, tmp_path, **ADAMW) as node:
        for request in (node.save(0, outside), node.restore(checkpoint=str(folder))):
            with pytest.raises(RefusedError, match="not in this run's folder of checkpoints") as refusal:
                await request
            assert refusal.value.code == 403
        offer = LinkOffer(
            stage=0,
            instance="x",
            carrier="shm",
            place=str(folder / "config.json"),
            slot_bytes=64,
            num_slots=1,
        )
        answer = await node.bus.request(subjects.LINK.at(node=0, stage=1), offer, timeout_s=5.0)
        assert (answer.accepted, "is not in this stage's" in answer.reason) == (False, True)
        assert (await node.complete(PROMPT, max_tokens=2)).finish == "length"


async def test_a_restore_that_takes_too_long_is_refused_and_done_later(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_node(folder, 2, tmp_path, **ADAMW) as node:
        with monkeypatch.context() as impatient:
            impatient.setattr(training, "RESTORE_DEADLINE_S", 0.0)
            with pytest.raises(RefusedError, match="not done within 0 s") as refusal:
                await node.restore(fence=1)
            assert refusal.value.code == 504
        await node.restore(fence=2)
        assert (await node.complete(PROMPT, max_tokens=2)).finish == "length"
