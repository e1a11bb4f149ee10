"""The trainer evaluates what it has trained on real stages, and has them serve only what is good enough."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from services.trainer.publication.hold_out import is_chosen
from services.trainer.publication.samples_file import read_samples
from services.trainer.service import Trainer
from services.trainer.settings import TrainerSettings
from services.trainer.streams import TRAIN_STREAM
from shared import checkpoints
from shared.bus.base import Incoming
from shared.clock import SystemClock
from shared.encoding import LabelledTokens
from shared.errors import NoResponderError
from shared.messages.inference import Placed
from shared.messages.training import TrainingTask
from shared.messages.weights import NodeWeights, RollBackWeights, WeightsRequest
from shared.settings import EMBEDDED_MODEL
from shared.subjects import BATCHES, NODE_WEIGHTS, PLACE, ROLLBACK
from shared.telemetry import Telemetry
from tests.integration.test_trainer_with_stages import tensors_in
from tests.support.models import save_tiny_model
from tests.support.node import DEADLINE_S, Answer, Node, running_node, running_nodes
from tests.support.reference import greedy_reference
from tests.support.saving import model_in
from tests.support.training import ADAMW, LORA, Batch, loss_of, num_labels, random_batches, settings_id
from tests.support.waiting import until

PROMPT = [3, 14, 15, 92, 65, 35]
HELD_OUT: Batch = random_batches(1, 3, seed=77)[0]


def examples_of(batch: Batch) -> list[dict[str, Any]]:
    return [{"token_ids": example} for microbatch in batch for example in microbatch]


@asynccontextmanager
async def guarded(
    node: Node, model: Path, run_dir: Path, *, num_nodes: int = 1, **settings: Any
) -> AsyncIterator[None]:
    """A trainer that has held-out examples."""
    held_out = run_dir / "held_out.jsonl"
    held_out.write_text("\n".join(map(json.dumps, examples_of(HELD_OUT))))
    given = {"held_out": str(held_out), **settings}
    async with training(node, model, run_dir, num_nodes=num_nodes, **given):
        yield


@asynccontextmanager
async def training(
    node: Node, model: Path, run_dir: Path, *, num_nodes: int = 1, **settings: Any
) -> AsyncIterator[None]:
    """A trainer, for which this test plays the scheduler."""
    turns = cycle(range(num_nodes))
    given: dict[str, Any] = {
        "evaluate_every": 2,
        "checkpoint_every": 2,
        "checkpoint_idle_s": 0.0,
        "keep_checkpoints": 100,
        **settings,
    }
    chosen = TrainerSettings(model=str(model), run_dir=run_dir, schedule="1f1b", microbatches=1, **given)

    async def place(incoming: Incoming[TrainingTask]) -> Placed:
        return Placed(node=next(turns))

    await node.bus.ensure_stream(TRAIN_STREAM)
    placing = await node.bus.respond(PLACE.at(), place)
    trainer = Trainer(chosen, bus=node.bus, clock=SystemClock(), telemetry=Telemetry("trainer", None))
    task = asyncio.create_task(trainer.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        await placing.unsubscribe()
    assert task.cancelled()


async def publish(node: Node, batches: list[Batch], first: int = 0) -> None:
    for number, batch in enumerate(batches, start=first):
        body = json.dumps({"id": f"b{number}", "examples": examples_of(batch)}).encode()
        await node.bus.publish_durable(BATCHES, body)


async def weights_when(
    node: Node, condition: Callable[[NodeWeights], object], *, timeout_s: float = 60.0
) -> NodeWeights:
    """What the trainer says of the node's weights, once it fulfils `condition`."""
    async with asyncio.timeout(timeout_s):
        while True:
            with suppress(NoResponderError):
                status = await node.bus.request(NODE_WEIGHTS.at(), WeightsRequest(), timeout_s=5.0)
                for found in status.nodes:
                    if condition(found):
                        return found
            await asyncio.sleep(0.02)


def loss_on_held_out(checkpoint: Path, model_folder: Path) -> float:
    model = model_in(checkpoint, model_folder)
    examples = [example for microbatch in HELD_OUT for example in microbatch]
    with torch.no_grad():
        return loss_of(model, dict(model.named_parameters()), examples, num_labels(HELD_OUT)).item()


async def first_evaluated(node: Node) -> NodeWeights:
    return await weights_when(node, lambda found: found.held_out_loss is not None)


@pytest.mark.parametrize(("num_stages", "settings"), [(1, {}), (2, {}), (2, LORA)], ids=settings_id)
async def test_a_good_version_is_served_and_its_loss_is_in_its_manifest(
    num_stages: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    model, run_dir = tmp_path / "model", tmp_path / "run"
    run_dir.mkdir()
    save_tiny_model("llama_tied", model)
    async with (
        running_node(model, num_stages, run_dir, **settings) as node,
        guarded(node, model, run_dir, learning_rate=0.003, max_held_out_rise=0.5),
    ):
        first = await first_evaluated(node)
        assert first.held_out_loss == pytest.approx(loss_on_held_out(model, model), abs=1e-4)
        await publish(node, [HELD_OUT, HELD_OUT])
        found = await weights_when(node, lambda found: found.published == 2)
        answer = await node.complete(PROMPT, max_tokens=8)
        manifest = run_dir / "checkpoints" / "node-0" / "step-00000002"
        await until(lambda: (read := checkpoints.read(manifest)) and read.held_out_loss is not None)
    assert set(answer.versions) == {2}
    newest = found.judged[-1]
    assert (newest.version, newest.why_withheld, found.withholds(2)) == (2, "", False)
    assert newest.held_out_loss == found.held_out_loss
    noted = checkpoints.read(manifest)
    assert noted is not None
    assert noted.held_out_loss == pytest.approx(found.held_out_loss)
    assert noted.held_out_loss == pytest.approx(loss_on_held_out(manifest, model), abs=1e-4)


async def learn_until(
    node: Node, condition: Callable[[NodeWeights], object], batches: Iterable[Batch], first: int
) -> NodeWeights:
    """Learn one batch after another until that holds, which it may do some time after a step.

    A version is only evaluated when the one before is, and is saved: of a few batches at once, maybe none.
    """
    for number, batch in enumerate(batches, start=first):
        await publish(node, [batch], first=number)
        await weights_when(node, lambda found, number=number: found.version == number + 1)
        with suppress(TimeoutError):
            return await weights_when(node, condition, timeout_s=0.5)
    raise AssertionError("it does not come to that")


async def test_a_version_that_does_worse_is_not_served_and_the_next_good_one_is(tmp_path: Path) -> None:
    model, run_dir = tmp_path / "model", tmp_path / "run"
    run_dir.mkdir()
    save_tiny_model("llama", model)
    async with (
        running_node(model, 2, run_dir) as node,
        guarded(node, model, run_dir, learning_rate=0.02, max_held_out_rise=9.0),
    ):
        await first_evaluated(node)
        await publish(node, [HELD_OUT] * 20)
        await weights_when(node, lambda found: found.version == 20 and found.published)
        batches = random_batches(20, 1, seed=5)
        bad = await learn_until(node, lambda found: (found.last_withheld or 0) > 20, batches, first=20)
        answer = await node.complete(PROMPT, max_tokens=8)
        assert set(answer.versions) == {bad.published}
        assert bad.published is not None and bad.last_withheld is not None
        assert 0 < bad.published < bad.last_withheld
        assert bad.withholds(bad.last_withheld) and "held-out loss" in bad.why_newest_withheld
        assert bad.judged[-1].training_loss is not None
        last = bad.version
        good = await learn_until(
            node, lambda found: (found.published or 0) > last, [HELD_OUT] * 40, first=last
        )
        answer = await node.complete(PROMPT, max_tokens=8)
    assert good.published is not None and min(answer.versions) >= good.published


async def test_an_evaluation_survives_the_restart_of_a_stage(tmp_path: Path) -> None:
    model, run_dir = tmp_path / "model", tmp_path / "run"
    run_dir.mkdir()
    save_tiny_model("llama", model)
    async with (
        running_node(model, 2, run_dir) as node,
        guarded(node, model, run_dir, learning_rate=0.003, max_held_out_rise=0.5),
    ):
        await first_evaluated(node)
        await publish(node, [HELD_OUT, HELD_OUT])
        await node.replace(1)
        await weights_when(node, lambda found: found.version == 2)
        await publish(node, [HELD_OUT] * 4, first=2)
        await weights_when(node, lambda found: (found.published or 0) >= 4)


PERIOD = 6
"""Steps from one evaluation to the next, in what follows. Only what is evaluated is saved."""
WARY: dict[str, Any] = {
    "learning_rate": 0.05,
    "max_held_out_rise": 0.0,
    "evaluate_every": PERIOD,
    "checkpoint_every": 1000,
    "checkpoint_idle_s": 1000.0,
    "keep_checkpoints": 1,
    "keep_checkpoint_ages_s": (),
    "max_kept_versions": 3,
}
BAD: list[Batch] = [[[[7] * 12]]] * (2 * PERIOD + 1)
"""Who always says the same does badly on `HELD_OUT`."""


def folder_of(run_dir: Path, version: int) -> Path:
    return run_dir / "checkpoints" / "node-0" / checkpoints.checkpoint_name(version)


async def withheld_and_durable(node: Node, run_dir: Path, num_good: int) -> NodeWeights:
    """Learn what is good, which is then served, and what is bad, which is not, and is saved."""
    await first_evaluated(node)
    if num_good:
        await publish(node, [HELD_OUT] * num_good)
        await weights_when(node, lambda found: found.published == found.durable_version == num_good)
        await until_it_may_serve_after_a_crash(run_dir, num_good)
    await publish(node, BAD[:PERIOD], first=num_good)
    return await weights_when(
        node, lambda found: found.last_withheld == found.durable_version == num_good + PERIOD
    )


async def until_it_may_serve_after_a_crash(run_dir: Path, version: int) -> None:
    """The verdict is on the disk, too."""
    await until(lambda: (read := checkpoints.read(folder_of(run_dir, version))) and read.may_serve)


async def test_rises_do_not_add_up_over_a_restart_of_the_trainer(tmp_path: Path) -> None:
    model, run_dir = tmp_path / "model", tmp_path / "run"
    run_dir.mkdir()
    save_tiny_model("llama", model)
    worse, last = 2 * PERIOD, 3 * PERIOD

    def noted() -> checkpoints.Manifest | None:
        return checkpoints.read(folder_of(run_dir, worse))

    async with running_node(model, 2, run_dir) as node:
        async with guarded(node, model, run_dir, **WARY | {"max_held_out_rise": 99.0}):
            await first_evaluated(node)
            await publish(node, [HELD_OUT] * PERIOD)
            before = await weights_when(node, lambda found: found.published == PERIOD)
            await publish(node, BAD[:PERIOD], first=PERIOD)
            after = await weights_when(node, lambda found: found.published == found.durable_version == worse)
            await until(lambda: (read := noted()) and read.held_out_loss is not None)
        manifest = noted()
        assert manifest and before.held_out_loss and after.held_out_loss
        assert after.held_out_loss > 1.1 * before.held_out_loss
        assert manifest.held_out_rise == pytest.approx(after.held_out_loss / before.held_out_loss)
        async with guarded(node, model, run_dir, **WARY | {"max_held_out_rise": 0.1, "learning_rate": 0.0}):
            await first_evaluated(node)
            await publish(node, BAD[:PERIOD], first=worse)
            found = await weights_when(node, lambda found: found.last_withheld == last)
    assert (found.published, found.num_withheld) == (worse, 1), "as good as what is served, and yet too bad"


async def restored(node: Node, fence: int, durable_version: int) -> NodeWeights:
    """What the trainer says when the stages are past that fence, and it can compare again."""
    await node.heard(lambda: all(beat.fence > fence for beat in node.heartbeats.values()))
    return await weights_when(
        node,
        lambda found: found.held_out_loss is not None and found.durable_version == durable_version,
    )


async def go_on_to_the_end(node: Node, run_dir: Path, first: int) -> None:
    """Learn the rest, all of it bad. The last version is saved, and the one before removed."""
    await publish(node, BAD[PERIOD : PERIOD + 1], first=first)
    await weights_when(node, lambda found: found.last_withheld == found.durable_version == first + 1)
    await publish(node, BAD[PERIOD + 1 :], first=first + 1)
    await weights_when(node, lambda found: found.durable_version == first + 1 + PERIOD)
    await until(lambda: not folder_of(run_dir, first + 1).exists())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft's, of a whole model
@pytest.mark.parametrize(
    ("restarts", "num_good", "adapter"),
    [
        ("stage", PERIOD, "none"),
        ("stage", 0, "none"),
        ("stage", PERIOD, "lora"),
        ("trainer", PERIOD, "none"),
        ("all", PERIOD, "none"),
        ("all", 0, "none"),
    ],
)
async def test_what_was_withheld_is_not_served_after_a_restart_and_trains_on(
    restarts: str, num_good: int, adapter: str, tmp_path: Path
) -> None:
    model, run_dir, undisturbed = tmp_path / "model", tmp_path / "run", tmp_path / "undisturbed"
    save_tiny_model("llama_tied", model)
    of_stages = {"adapter": adapter, **ADAMW}
    last = num_good + len(BAD)
    for folder in (run_dir, undisturbed):
        folder.mkdir()

    async def served(node: Node) -> Answer:
        return await node.complete(PROMPT, max_tokens=12)

    async def goes_on(node: Node, before: NodeWeights, fence: int) -> None:
        after = await restored(node, fence, before.durable_version)
        assert (after.version, after.published) == (before.durable_version, num_good)
        assert after.held_out_loss == pytest.approx(before.held_out_loss)
        answers.append(await served(node))
        await go_on_to_the_end(node, run_dir, after.version)

    answers: list[Answer] = []
    async with running_node(model, 2, run_dir, **of_stages) as node:
        async with guarded(node, model, run_dir, **WARY):
            before = await withheld_and_durable(node, run_dir, num_good)
            assert before.published == num_good
            good = model_in(folder_of(run_dir, num_good) if num_good else model, model)
            answers.append(await served(node))
            fence = node.heartbeats[0].fence
            if restarts == "stage":
                await node.replace(1)
                await goes_on(node, before, fence)
        if restarts == "all":
            for stage in range(2):
                await node.replace(stage)
            await node.ready()
            answers.append(await served(node))
        if restarts != "stage":
            async with guarded(node, model, run_dir, **WARY):
                await goes_on(node, before, fence)
        answers.append(await served(node))
    async with (
        running_node(model, 2, undisturbed, **of_stages) as node,
        guarded(node, model, undisturbed, **WARY | {"held_out": "", "checkpoint_every": last}),
    ):
        await publish(node, [HELD_OUT] * num_good + BAD)
        await weights_when(node, lambda found: found.durable_version == last)

    expected, _ = greedy_reference(good, PROMPT, 12)
    for answer in answers:
        assert set(answer.versions) == {num_good}
        assert answer.token_ids == expected
    learnt, alone = tensors_in(folder_of(run_dir, last)), tensors_in(folder_of(undisturbed, last))
    assert learnt.keys() == alone.keys()
    for name, tensor in alone.items():
        assert torch.equal(learnt[name], tensor), name
    kept = [each.manifest for each in checkpoints.checkpoints(run_dir / "checkpoints", 0)]
    assert [(each.version, each.may_serve) for each in kept if each.version] == [
        (version, version == num_good) for version in (last, num_good) if version
    ]


async def test_who_goes_back_to_a_version_that_was_withheld_is_answered_by_it(tmp_path: Path) -> None:
    model, run_dir = tmp_path / "model", tmp_path / "run"
    save_tiny_model("llama", model)
    run_dir.mkdir()
    async with running_node(model, 2, run_dir) as node, guarded(node, model, run_dir, **WARY):
        withheld = (await withheld_and_durable(node, run_dir, PERIOD)).durable_version
        await node.bus.request(ROLLBACK.at(), RollBackWeights(version=withheld), timeout_s=DEADLINE_S)
        await weights_when(node, lambda found: found.published == withheld and found.held_out_loss)
        answer = await node.complete(PROMPT, max_tokens=12)
    expected, _ = greedy_reference(model_in(folder_of(run_dir, withheld), model), PROMPT, 12)
    assert (set(answer.versions), answer.token_ids) == ({withheld}, expected)


@pytest.mark.parametrize("merge", ["average", "allreduce"])
async def test_nodes_that_share_their_weights_serve_what_any_of_them_was_let_serve(
    merge: str, tmp_path: Path
) -> None:
    """One of them has the checkpoints of both."""
    model = tmp_path / "model"
    settings = WARY | {"merge": merge, "merge_every": 2, "evaluate_every": 4}

    async def on_both(condition: Callable[[NodeWeights], object]) -> None:
        for number in range(2):
            await weights_when(
                nodes[0], lambda found, number=number: found.node == number and condition(found)
            )

    save_tiny_model("llama_tied", model)
    async with running_nodes(2, model, 2, tmp_path, merge=merge, **ADAMW) as nodes:
        async with guarded(nodes[0], model, tmp_path, num_nodes=2, **settings):
            await on_both(lambda found: found.held_out_loss is not None)
            await publish(nodes[0], [HELD_OUT] * 4)
            await on_both(lambda found: found.published == found.durable_version == 4)
            await publish(nodes[0], BAD[:4], first=4)
            await on_both(lambda found: found.last_withheld == found.durable_version == 8)
        async with guarded(nodes[0], model, tmp_path, num_nodes=2, **settings):
            await on_both(lambda found: found.held_out_loss is not None)
            await on_both(lambda found: (found.version, found.published) == (8, 4))
            answers = [await node.complete(PROMPT, max_tokens=12) for node in nodes]
    good = checkpoints.newest_serving(tmp_path / "checkpoints", range(2), model=str(model))
    assert good is not None
    expected, _ = greedy_reference(model_in(good.folder, model), PROMPT, 12)
    for answer in answers:
        assert (set(answer.versions), answer.token_ids) == ({4}, expected)


TEXTS = [{"prompt": "The harbour is", "completion": " closed today."}]
"""For the model that comes with the project, which has a tokenizer."""


async def publish_texts(node: Node, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        body = json.dumps({"id": f"t{number}", "examples": TEXTS}).encode()
        await node.bus.publish_durable(BATCHES, body)


@pytest.mark.parametrize("num_stages", [1, 2])
async def test_without_a_file_a_version_is_judged_by_what_the_model_wrote_itself(
    num_stages: int, tmp_path: Path
) -> None:
    """The first one is made in time, at rest; the others forget all, also over a restart."""
    model = Path(EMBEDDED_MODEL)
    settings = {"guard_samples": 4, "evaluate_every": 100}
    async with running_node(model, num_stages, tmp_path, **ADAMW) as node:
        async with training(node, model, tmp_path, learning_rate=1e-5, **settings):
            first = await weights_when(node, lambda found: found.samples_loss is not None)
            await publish_texts(node, 1)
            good = await weights_when(node, lambda found: found.published == 1 and found.samples_loss)
            assert good.samples_loss == pytest.approx(first.samples_loss, abs=0.05)
            samples = read_samples(tmp_path / "checkpoints", model=str(model))
            assert samples is not None and samples.loss == pytest.approx(first.samples_loss, abs=1e-3)
        async with training(node, model, tmp_path, learning_rate=0.1, **settings):
            await weights_when(node, lambda found: found.samples_loss == pytest.approx(good.samples_loss))
            await publish_texts(node, 3, first=1)
            bad = await weights_when(node, lambda found: found.last_withheld == found.durable_version == 4)
            answer = await node.complete(PROMPT, max_tokens=8)
        assert read_samples(tmp_path / "checkpoints", model=str(model)) == samples
    assert bad.published == 1 and "own samples" in bad.why_withheld
    served = model_in(folder_of(tmp_path, 1), model)
    assert (set(answer.versions), answer.token_ids) == ({1}, greedy_reference(served, PROMPT, 8)[0])
    alone = [loss_on(served, each) for each in samples.examples]
    mean = sum(loss for loss, _ in alone) / sum(count for _, count in alone)
    assert good.samples_loss == pytest.approx(mean, abs=1e-3)


def loss_on(model: Any, example: LabelledTokens) -> tuple[float, int]:
    """The summed loss of the labelled tokens by transformers' own forward, and their number."""
    with torch.no_grad():
        logprobs = model(torch.tensor([example.tokens])).logits[0].log_softmax(-1)
    rows = torch.tensor(example.label_rows)
    picked = logprobs[rows, torch.tensor(example.labels)]
    return -picked.sum().item(), len(example.label_rows)


async def test_a_share_of_what_is_published_is_held_out_and_judges_also_over_a_restart(
    tmp_path: Path,
) -> None:
    """Each batch is one example. Those to hold out come first, before anything could freeze the set."""
    model, run_dir = tmp_path / "model", tmp_path / "run"
    run_dir.mkdir()
    save_tiny_model("llama", model)
    share = 0.4
    settings = {"hold_out_share": share, "max_held_out_rise": 9.0, "learning_rate": 0.003}
    examples = [microbatch[0] for (microbatch,) in random_batches(60, 1, seed=3)]

    def is_held_out(tokens: list[int]) -> bool:
        return is_chosen(LabelledTokens(tuple(tokens), tuple(range(len(tokens) - 1))), share)

    held_out = [tokens for tokens in examples if is_held_out(tokens)]
    trained = [tokens for tokens in examples if not is_held_out(tokens)]
    batches: list[Batch] = [[[tokens]] for tokens in held_out + trained]
    async with running_node(model, 2, run_dir) as node:
        async with training(node, model, run_dir, **settings):
            await publish(node, batches)
            found = await weights_when(node, lambda found: found.published == len(trained))
            await until_it_may_serve_after_a_crash(run_dir, len(trained))
        async with training(node, model, run_dir, **settings):
            again = await first_evaluated(node)
            await publish(node, batches, first=len(batches))
            last = await weights_when(node, lambda found: found.published == 2 * len(trained))
    stored = json.loads((run_dir / "checkpoints" / "held_out.json").read_bytes())
    assert stored["is_frozen"] and [each["tokens"] for each in stored["examples"]] == held_out
    assert found.held_out_loss is not None and again.held_out_loss == pytest.approx(found.held_out_loss)
    served = model_in(folder_of(run_dir, 2 * len(trained)), model)
    with torch.no_grad():
        num = sum(len(tokens) - 1 for tokens in held_out)
        expected = loss_of(served, dict(served.named_parameters()), held_out, num).item()
    assert last.held_out_loss == pytest.approx(expected, abs=1e-4)
