"""Going back while real stages answer: later answers are those of the older version, none is broken off."""

from pathlib import Path
from typing import Any

import pytest

from shared.messages.weights import RollBackWeights
from shared.subjects import ROLLBACK
from tests.integration.test_trainer_with_stages import Applied, durable, publish, running_trainer
from tests.support.models import save_tiny_model
from tests.support.node import DEADLINE_S, Node, running_node
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
