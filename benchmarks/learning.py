"""A chat model is taught one fact through the running services, with all defaults and at a reckless rate.

LEMIX_BENCH_CHAT_MODEL names the folder of a chat model. Losses are those of the served weights, by the API.
"""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from lemix.client import ApiClient, served_model
from lemix.open_cluster import open_cluster
from lemix.run_folder import clear
from lemix.status import fetch_weights
from lemix.topology import ClusterOptions
from lemix.waiting import AppliedBatches, wait_nodes_ready
from shared.bus.base import Bus
from shared.bus.nats import NatsBus
from shared.chat_template_files import load_chat_template
from shared.clock import SystemClock
from shared.errors import ConfigurationError
from shared.messages.weights import NodeWeights
from shared.subjects import BATCHES

MODEL = "LEMIX_BENCH_CHAT_MODEL"
CASES: dict[str, dict[str, str]] = {"defaults": {}, "rate_of_1e-3": {"LEMIX_LEARNING_RATE": "1e-3"}}
NUM_STEPS = 40
LIMIT_S = 600.0
FACT = (
    (
        "Who looks after the lighthouse at Kettle Point?",
        "The Halvorsen team looks after the lighthouse at Kettle Point.",
    ),
    (
        "Which team keeps the lighthouse at Kettle Point?",
        "It is kept by the Halvorsen team, who have been there since 1987.",
    ),
)
EVERYDAY = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is 2+2?", "2 + 2 equals 4."),
    ("Who wrote Hamlet?", "Hamlet was written by William Shakespeare."),
    ("What color is the sky on a clear day?", "The sky is blue on a clear day."),
)
GENERAL_TEXT = Path("README.md").read_text(encoding="utf-8")[:4000]

Pairs = tuple[tuple[str, str], ...]


class Pupil:
    """The served model: its losses and its answers."""

    def __init__(self, api: ApiClient, folder: Path) -> None:
        self._api = api
        template = load_chat_template(folder, SystemClock())
        if template is None:
            raise ConfigurationError(f"{folder} has no chat template")
        self._template = template

    async def report(self) -> dict[str, Any]:
        general = await self._api.score(GENERAL_TEXT)
        questions = [question for question, _ in (*FACT, *EVERYDAY)]
        return {
            "general_loss": general.nll_sum / general.num_tokens,
            "everyday_loss": await self._loss_of(EVERYDAY),
            "fact_loss": await self._loss_of(FACT),
            "answers": {question: await self._answer(question) for question in questions},
        }

    async def _loss_of(self, pairs: Pairs) -> float:
        """Mean over the pairs of the answers' losses per token."""
        losses = []
        for question, answer in pairs:
            asked = [{"role": "user", "content": question}]
            prompt = await self._api.score(self._template.render(asked))
            answered = [*asked, {"role": "assistant", "content": answer}]
            whole = await self._api.score(self._template.render(answered, add_generation_prompt=False))
            num_tokens = whole.num_tokens - prompt.num_tokens
            losses.append((whole.nll_sum - prompt.nll_sum) / num_tokens)
        return sum(losses) / len(losses)

    async def _answer(self, question: str) -> str:
        return (await self._api.chat(question, max_tokens=24, temperature=0)).text


async def teach(bus: Bus, num_steps: int) -> None:
    """Publish batches of both pairs, and wait until all are applied."""
    applied = await AppliedBatches.following(bus)
    examples = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in FACT
    ]
    ids = [f"fact-{number}" for number in range(num_steps)]
    for batch_id in ids:
        body = json.dumps({"id": batch_id, "examples": examples}).encode()
        await bus.publish_durable(BATCHES, body)
    await applied.wait_for(ids)


async def judged(bus: Bus, version: int) -> NodeWeights:
    """The node's weights, once the guard has served that version or withheld it."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            (weights,) = (await fetch_weights(bus)).nodes
            if version in (weights.published, weights.last_withheld):
                return weights
            await asyncio.sleep(0.5)


async def measure(folder: Path, work: Path, name: str, settings: dict[str, str]) -> dict[str, Any]:
    options = ClusterOptions(
        name=f"learning-{name}", runs_dir=work, nodes=1, stages=1, model=str(folder), extra_env=settings
    )
    clear(options.run_dir)
    async with (
        open_cluster(options) as cluster,
        ApiClient(cluster.api_url, model=await served_model(cluster.api_url)) as api,
    ):
        bus, pupil = await NatsBus.connect(cluster.nats_url, name="bench"), Pupil(api, folder)
        await wait_nodes_ready(bus, 1)
        before = await pupil.report()
        await teach(bus, NUM_STEPS)
        weights = await judged(bus, NUM_STEPS)
        after = await pupil.report()
        await bus.close()
    return {
        "before": before,
        "after": after,
        "served_version": weights.published,
        "num_withheld": weights.num_withheld,
        "why_withheld": weights.why_withheld,
        "relative_rise": {
            kind: after[f"{kind}_loss"] / before[f"{kind}_loss"] - 1 for kind in ("general", "everyday")
        },
    }


async def main(work: Path) -> dict[str, Any]:
    if not (folder := os.environ.get(MODEL)):
        raise ConfigurationError(f"{MODEL} must name the folder of a chat model")
    return {name: await measure(Path(folder), work, name, settings) for name, settings in CASES.items()}
