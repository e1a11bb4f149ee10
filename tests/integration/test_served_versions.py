"""Which weights answer while a node trains: pinned, published, gone after a restore; scoring beside it."""

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from shared.errors import RefusedError
from shared.messages.weights import SavedWeights, ServingRule
from tests.integration.test_pipeline_mixed import ENDLESS, PROMPT, step
from tests.support.models import save_tiny_model
from tests.support.node import Answer, Node, running_node
from tests.support.reference import greedy_reference
from tests.support.saving import model_in, save
from tests.support.training import BFLOAT16, LORA, random_batches, settings_id
from tests.support.waiting import until

NUM_VERSIONS = 4
MAX_TOKENS = 24
PROMPTS = [PROMPT, [7, 7, 3], [90, 12, 33, 4, 6, 71, 2]]
FAST: dict[str, Any] = {"training_patience_s": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny_model("llama_tied", path)
    return path


async def learn(node: Node, model: Path, run_dir: Path, version: int) -> None:
    """A step far enough to change every answer; the version is kept by the stages, and saved."""
    await step(node, f"b{version}", random_batches(1, 2, seed=version)[0])
    await save(node, model, version, run_dir / "checkpoints" / f"v{version}")


def model_of(model: Path, run_dir: Path, version: int) -> Any:
    return model_in(run_dir / "checkpoints" / f"v{version}" if version else model, model)


async def pinned_while_training(
    node: Node, model: Path, run_dir: Path, prompts: list[list[int]]
) -> list[tuple[int, list[int], Answer]]:
    """The prompts asked of each version when it is published, and the whole answers."""
    answers: list[tuple[int, list[int], Answer]] = []
    await node.restore(serving="pinned")
    node.keeps, node.learning_rate = True, 0.05
    for version in range(NUM_VERSIONS):
        if version:
            await learn(node, model, run_dir, version)
            await node.publish(version)
            await node.until_published(version)
        for prompt in prompts:
            answers.append((version, prompt, await node.start(prompt, max_tokens=MAX_TOKENS)))
        await asyncio.gather(*(answer.first_token() for _, _, answer in answers[-len(prompts) :]))
    await asyncio.gather(*(answer.end() for _, _, answer in answers))
    await node.serves(NUM_VERSIONS - 1)
    for version, _, answer in answers:
        assert answer.failure is None
        assert set(answer.versions) == {version}
    assert len({tuple(answer.token_ids) for _, _, answer in answers}) > len(prompts), "all say the same"
    return answers


@pytest.mark.parametrize(
    ("num_stages", "settings"), [(1, {}), (2, {}), (3, {}), (1, LORA), (2, LORA)], ids=settings_id
)
async def test_pinned_answers_equal_generate_with_exactly_their_version(
    num_stages: int, settings: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    async with running_node(folder, num_stages, tmp_path, **FAST, **settings) as node:
        answers = await pinned_while_training(node, folder, tmp_path, PROMPTS)
    models = [model_of(folder, tmp_path, version) for version in range(NUM_VERSIONS)]
    for version, prompt, answer in answers:
        tokens, _ = greedy_reference(models[version], prompt, MAX_TOKENS)
        assert answer.token_ids == tokens


@pytest.mark.parametrize("settings", [BFLOAT16, LORA | BFLOAT16], ids=settings_id)
async def test_pinned_answers_in_bfloat16_are_those_of_a_node_that_holds_nothing_else(
    settings: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    """One prompt, and one at a time: bfloat16's last bit depends on what else is in an iteration."""
    async with running_node(folder, 2, tmp_path, **FAST, **settings) as node:
        answers = await pinned_while_training(node, folder, tmp_path, PROMPTS[:1])
        for version, prompt, answer in answers:
            checkpoint = str(tmp_path / "checkpoints" / f"v{version}") if version else ""
            await node.restore(fence=version + 2, version=version, checkpoint=checkpoint)
            again = await node.complete(prompt, max_tokens=MAX_TOKENS)
            assert answer.token_ids == again.token_ids


async def request_on_end(node: Node, answers: list[Answer]) -> None:
    """One request after the other."""
    while True:
        answers.append(await node.start(PROMPT, max_tokens=8))
        await answers[-1].end()


async def release_unused(node: Node, num_released: int) -> int:
    """As the trainer does; returns how many versions are released by now."""
    if node.served is None:
        return num_released
    oldest = min((*node.served.in_use, node.served.published))
    for version in range(num_released, oldest):
        await node.release(version)
    return max(num_released, oldest)


@pytest.mark.parametrize("rule", ["newest", "pinned"])
async def test_no_request_fails_across_200_versions(rule: ServingRule, folder: Path, tmp_path: Path) -> None:
    """Three requests run at any time. Unused versions are released all the while."""
    num_versions, num_released = 200, 0
    (batch,) = random_batches(1, 1)
    answers: list[Answer] = []
    async with running_node(folder, 2, tmp_path, **FAST) as node:
        await node.restore(serving=rule)
        node.keeps = rule != "newest"
        async with asyncio.TaskGroup() as group:
            streams = [group.create_task(request_on_end(node, answers)) for _ in range(3)]
            for version in range(1, num_versions + 1):
                await step(node, f"b{version}", batch)
                if node.keeps:
                    await node.publish(version)
                    num_released = await release_unused(node, num_released)
            for stream in streams:
                stream.cancel()
        await asyncio.gather(*(answer.end() for answer in answers))
    assert {answer.failure for answer in answers} == {None}
    assert {len(answer.tokens) for answer in answers} == {8}
    assert len({version for answer in answers for version in answer.versions}) > num_versions // 4
    if rule == "pinned":
        assert all(len(set(answer.versions)) == 1 for answer in answers)
    if node.keeps:
        assert num_released > num_versions // 2


async def test_published_requests_move_on_and_ignore_what_is_not_published(
    folder: Path, tmp_path: Path
) -> None:
    async with running_node(folder, 2, tmp_path, **FAST) as node:
        await node.restore(serving="published")
        node.keeps = True
        answer = await node.start(PROMPT, **ENDLESS)
        await answer.first_token()
        await learn(node, folder, tmp_path, 1)
        assert set(answer.versions) == {0}
        await learn(node, folder, tmp_path, 2)
        await node.publish(2)
        await node.serves(2, 2)
        await until(lambda: answer.versions[-1] == 2)
        await node.cancel(answer)
        assert set(answer.versions) == {0, 2}
        assert set((await node.complete(PROMPT, max_tokens=4)).versions) == {2}


@pytest.mark.parametrize(("num_stages", "settings"), [(1, {}), (2, {}), (2, LORA)], ids=settings_id)
async def test_requests_whose_version_is_gone_fail_once_and_clearly(
    num_stages: int, settings: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    async with running_node(folder, num_stages, tmp_path, **FAST, **settings) as node:
        await node.restore(serving="pinned")
        node.keeps = True
        old = await node.start(PROMPT, max_tokens=2000)
        await old.first_token()
        await learn(node, folder, tmp_path, 1)
        await node.publish(1)
        await node.until_published(1)
        new = [await node.start(prompt, **ENDLESS) for prompt in PROMPTS]
        await asyncio.gather(*(answer.first_token() for answer in new))
        await node.restore(fence=2, serving="pinned")
        for answer in new:
            await answer.end()
            assert answer.failure is not None
            assert answer.failure.code == 503
            assert "gone" in answer.failure.reason
        after = await node.complete(PROMPT, max_tokens=30)
    expected, _ = greedy_reference(model_of(folder, tmp_path, 0), PROMPT, 30)
    assert after.token_ids == expected


@pytest.mark.parametrize(("num_stages", "settings"), [(1, {}), (2, {}), (2, LORA)], ids=settings_id)
async def test_what_is_served_beside_newer_weights_answers_on_through_a_restore(
    num_stages: int, settings: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    async with running_node(folder, num_stages, tmp_path, **FAST, **settings) as node:
        await node.restore(serving="pinned")
        node.keeps, node.learning_rate = True, 0.05
        for version in (1, 2):
            await learn(node, folder, tmp_path, version)
        await node.publish(1)
        await node.until_published(1)
        before = await node.start(PROMPT, max_tokens=80)
        await before.first_token()
        older, newer = (str(tmp_path / "checkpoints" / f"v{version}") for version in (1, 2))
        served = SavedWeights(version=1, checkpoint=older)
        await node.restore(fence=2, version=2, checkpoint=newer, serving="pinned", served=served)
        await before.end()
        after = await node.complete(PROMPT, max_tokens=80)
        trained_on = await node.complete(PROMPT, max_tokens=80, changes={"weights_version": 2})
        with pytest.raises(RefusedError, match="not in this run's folder"):
            outside = SavedWeights(version=1, checkpoint=str(folder))
            await node.restore(fence=3, version=2, checkpoint=newer, serving="pinned", served=outside)
    for answer, version in ((before, 1), (after, 1), (trained_on, 2)):
        expected, _ = greedy_reference(model_of(folder, tmp_path, version), PROMPT, 80)
        assert answer.failure is None
        assert (set(answer.versions), answer.token_ids) == ({version}, expected)


@pytest.mark.parametrize(
    ("num_stages", "is_guarded", "settings"),
    [(1, False, {}), (1, True, {}), (2, True, {}), (2, True, LORA)],
    ids=settings_id,
)
async def test_what_was_gone_back_from_while_the_node_was_away_serves_no_more(
    num_stages: int, is_guarded: bool, settings: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    """It serves a version 1 that others have gone back from, and has not loaded theirs."""
    first, second = (str(tmp_path / "checkpoints" / name) for name in ("v1", "v2"))
    async with running_node(folder, num_stages, tmp_path, **FAST, **settings) as node:
        node.keeps, node.learning_rate = True, 0.05
        await node.restore(serving="pinned")
        for version in (1, 2):
            await learn(node, folder, tmp_path, version)
        await node.restore(fence=2, serving="pinned")
        await step(node, "other", random_batches(1, 2, seed=9)[0], fence=2)
        await node.publish(1)
        await node.until_published(1)
        before = await node.start(PROMPT, max_tokens=2000)
        await before.first_token()

        if is_guarded:
            served = SavedWeights(version=1, checkpoint=first)
            await node.restore(fence=3, version=2, checkpoint=second, serving="pinned", served=served)
        else:
            await node.restore(fence=3, version=1, checkpoint=first, serving="pinned")
        await before.end()
        after = await node.complete(PROMPT, max_tokens=MAX_TOKENS)
    assert before.failure is not None
    assert (before.failure.code, "gone" in before.failure.reason) == (503, True)
    expected, _ = greedy_reference(model_of(folder, tmp_path, 1), PROMPT, MAX_TOKENS)
    assert (set(after.versions), after.token_ids) == ({1}, expected)


@pytest.mark.parametrize("num_stages", [1, 2])
async def test_a_checkpoint_that_has_taken_the_place_of_another_is_loaded(
    num_stages: int, folder: Path, tmp_path: Path
) -> None:
    place = tmp_path / "checkpoints" / "step"
    async with running_node(folder, num_stages, tmp_path, **FAST) as node:
        node.learning_rate = 0.05
        await node.restore()
        for version in (1, 2):
            await learn(node, folder, tmp_path, version)
        answers = []
        for version in (1, 2):
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(tmp_path / "checkpoints" / f"v{version}", place)
            await node.restore(fence=version + 1, version=5, checkpoint=str(place), digest=f"of {version}")
            answers.append(await node.complete(PROMPT, max_tokens=MAX_TOKENS))
    for version, answer in zip((1, 2), answers, strict=True):
        expected, _ = greedy_reference(model_of(folder, tmp_path, version), PROMPT, MAX_TOKENS)
        assert (set(answer.versions), answer.token_ids) == ({5}, expected)


async def scored(node: Node, versions: Sequence[int]) -> dict[int, list[Answer]]:
    """Every prompt scored with each of the versions."""
    changes = [{"deferrable": True, "weights_version": version} for version in versions]
    answers = {
        change["weights_version"]: [
            await node.start(prompt, changes=change, max_tokens=0, num_logprobs=0, prompt_logprobs=True)
            for prompt in PROMPTS
        ]
        for change in changes
    }
    for answer in (each for of_version in answers.values() for each in of_version):
        await answer.end()
    return answers


@pytest.mark.parametrize(
    ("num_stages", "rule", "settings"),
    [
        *((num_stages, rule, {}) for num_stages in (1, 2) for rule in ("published", "pinned")),
        (2, "pinned", LORA),
    ],
    ids=settings_id,
)
async def test_held_out_prompts_are_scored_with_their_version_while_others_are_answered(
    num_stages: int, rule: ServingRule, settings: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    async with running_node(folder, num_stages, tmp_path, **FAST, **settings) as node:
        await node.restore(serving=rule)
        node.keeps, node.learning_rate = True, 0.05
        busy = await node.start(PROMPT, **ENDLESS)
        await learn(node, folder, tmp_path, 1)
        await learn(node, folder, tmp_path, 2)
        answers = await scored(node, [0, 2, 1])
        assert busy.failure is None
        await node.cancel(busy)
        await node.release(1)
        (gone, *_) = (await scored(node, [1]))[1]
    assert gone.failure is not None
    assert (gone.failure.code, "version 1 is gone" in gone.failure.reason) == (503, True)
    for version, of_version in answers.items():
        model = model_of(folder, tmp_path, version)
        for prompt, answer in zip(PROMPTS, of_version, strict=True):
            _, logprobs = greedy_reference(model, prompt, 1)
            assert [token.logprob for token in answer.prompt] == pytest.approx(logprobs[:-1], abs=1e-4)
            assert (answer.finish, answer.tokens) == ("length", [])
