"""Going back while real stages answer: later answers are those of the older version, none is broken off."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from services.trainer.streams import TRAIN_STREAM
from shared.messages.weights import RollBackWeights, RolledBack
from shared.subjects import ROLLBACK
from tests.integration import test_trainer_with_replicas as replicas
from tests.integration.test_trainer_with_stages import Applied, durable, publish, running_trainer
from tests.support.models import save_tiny_model
from tests.support.node import DEADLINE_S, Node, running_node, running_nodes
from tests.support.plain import EPSILON, Plain, State, assert_close, assert_identical
from tests.support.saving import tensors_in
from tests.support.training import ADAMW, LORA, settings_id

PROMPT = [3, 14, 15, 92, 65, 35]


async def logprobs(node: Node) -> list[float]:
    answer = await node.complete(PROMPT, max_tokens=8, num_logprobs=0)
    return [token.logprob for token in answer.tokens]


@pytest.mark.parametrize(("num_stages", "settings"), [(1, {}), (2, {}), (2, LORA)], ids=settings_id)
async def test_answers_are_those_of_the_older_version(
    num_stages: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    model_folder, run_dir = tmp_path / "model", tmp_path / "run"
    run_dir.mkdir()
    save_tiny_model("llama", model_folder)
    applied = Applied()
    async with running_node(model_folder, num_stages, run_dir, **ADAMW, **settings) as node:
        await applied.start(node)
        async with running_trainer(node, model_folder, run_dir):
            await publish(node, 0, 2)
            await durable(run_dir, version=2)
            older = await logprobs(node)
            await publish(node, 2, 4)
            await durable(run_dir, version=4)
            assert await logprobs(node) != pytest.approx(older, abs=1e-3)
            running = await node.start(PROMPT, max_tokens=400)
            await running.first_token()

            order = RollBackWeights(version=2)
            await node.bus.request(ROLLBACK.at(), order, timeout_s=DEADLINE_S)
            await node.heard(
                lambda: all(
                    beat.weights_version == 2 and beat.checkpoint.endswith("step-00000002")
                    for beat in node.heartbeats.values()
                )
            )

            assert await logprobs(node) == pytest.approx(older, abs=1e-4)
            await running.end()
            assert running.finish == "length"
            assert (running.versions[0], running.versions[-1]) == (4, 2)
            assert sorted(running.versions, reverse=True) == running.versions


@pytest.mark.parametrize(("num_stages", "settings"), [(2, {}), (1, LORA)], ids=settings_id)
async def test_the_model_as_it_was_given_answers_again(
    num_stages: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    model_folder, run_dir = tmp_path / "model", tmp_path / "run"
    run_dir.mkdir()
    save_tiny_model("llama", model_folder)
    async with running_node(model_folder, num_stages, run_dir, **ADAMW, **settings) as node:
        await Applied().start(node)
        given = await logprobs(node)
        async with running_trainer(node, model_folder, run_dir):
            await publish(node, 0, 2)
            await durable(run_dir, version=2)
            assert await logprobs(node) != pytest.approx(given, abs=1e-3)
            await node.heard(lambda: all(beat.weights_version == 2 for beat in node.heartbeats.values()))

            answer = await node.bus.request(ROLLBACK.at(), RollBackWeights(version=0), timeout_s=DEADLINE_S)
            await node.heard(lambda: all(beat.weights_version == 0 for beat in node.heartbeats.values()))

            assert answer == RolledBack(nodes=(0,), num_discarded=2)
            assert await logprobs(node) == pytest.approx(given, abs=1e-5)
            await publish(node, 2, 3)
            await durable(run_dir, version=1)
    (kept,) = (run_dir / "checkpoints" / "node-0").glob("step-00000000")
    assert [file.name for file in kept.iterdir()] == ["lemix.json"], "the model's files are not copied"


async def train_one_by_one(folder: Path, nodes: list[Node], start: int, stop: int, *, version: int) -> None:
    """Nodes take turns, and become one after each batch; `version` is that of the weights before."""
    for place, number in enumerate(range(start, stop)):
        await replicas.publish(nodes[0].bus, number, number + 1)
        await replicas.durable(folder, version + place + 1)
    await replicas.all_hold(nodes, version + stop - start)


def plainly_trained(model: Path, *numbers: int) -> State:
    plain = Plain(AutoModelForCausalLM.from_pretrained(model))
    for number in numbers:
        plain.train(replicas.BATCHES_OF_THE_RUN[number])
    return plain.state()


@pytest.mark.parametrize("merge", ["average", "allreduce"])
async def test_nodes_that_share_their_weights_go_back_together_and_learn_on_from_there(
    merge: str, tmp_path: Path
) -> None:
    model, settings = tmp_path / "model", {**ADAMW, "merge": merge, "optimizer_epsilon": EPSILON}
    save_tiny_model("llama_tied", model)
    async with running_nodes(2, model, 2, tmp_path, **settings) as nodes:
        bus = nodes[0].bus
        await bus.ensure_stream(TRAIN_STREAM)
        await replicas.place_in_turns(bus, num_nodes=2)
        async with replicas.running_trainer(bus, tmp_path, schedule="1f1b", merge=merge, keep_checkpoints=9):
            await train_one_by_one(tmp_path, nodes, 0, 4, version=0)

            order = RollBackWeights(version=2)
            answer = await bus.request(ROLLBACK.at(), order, timeout_s=DEADLINE_S)
            await replicas.all_hold(nodes, 2)

            older = await replicas.durable(tmp_path, 2)
            for node in nodes:
                state = await replicas.state_of(node, 2, tmp_path / "checkpoints" / f"older-{node.number}")
                assert_identical(state, tensors_in(older.folder))
            await train_one_by_one(tmp_path, nodes, 4, 6, version=2)
            states = [
                await replicas.state_of(node, 4, tmp_path / "checkpoints" / f"end-{node.number}")
                for node in nodes
            ]

    assert answer == RolledBack(nodes=(0, 1), num_discarded=2)
    assert_identical(*states)
    assert_close(states[0], plainly_trained(model, 0, 1, 4, 5))
