"""From an answer to a lesson with real processes over real NATS: corrected, trained, told by the lineage."""

import asyncio
from pathlib import Path
from typing import Any

import openai

from lemix.client import served_model
from lemix.launcher import LocalCluster
from lemix.lineage_command import fetch_lineage
from lemix.run_choice import Target
from lemix.topology import ClusterOptions
from shared import checkpoints
from tests.support.chat_templates import CHATML
from tests.support.waiting import LOOK_EVERY_S

DEADLINE_S = 180.0
QUESTION: list[Any] = [{"role": "user", "content": "Wind at Northpoint?"}]


async def status(client: openai.AsyncOpenAI) -> str:
    """How the newest feedback stands."""
    page = await client.get("/feedback", cast_to=dict[str, Any])
    return str(page["data"][0]["status"])


async def test_a_corrected_answer_is_learnt_and_named_by_the_lineage_of_what_serves(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(CHATML)
    options = ClusterOptions(
        name="feedback",
        runs_dir=tmp_path / "runs",
        nodes=1,
        stages=2,
        stages_per_worker=2,
        extra_env={
            "LEMIX_FEEDBACK": "on",
            "LEMIX_FEEDBACK_BATCH_AFTER_S": "0",
            "LEMIX_CHAT_TEMPLATE": str(template),
            "LEMIX_CHECKPOINT_IDLE_S": "0.2",
            "LEMIX_NATS_URL": "",
        },
    )
    async with (
        LocalCluster(options) as cluster,
        openai.AsyncOpenAI(base_url=f"{cluster.api_url}/v1", api_key="none") as client,
    ):
        model = await served_model(cluster.api_url)
        asked: dict[str, Any] = {"model": model, "messages": QUESTION, "max_tokens": 8}
        await client.chat.completions.create(**asked)
        answer = await client.chat.completions.create(**asked, store=True)
        body = {"id": answer.id, "correction": "Wind at Northpoint is south, force 5."}
        given = await client.post("/feedback", body=body, cast_to=dict[str, Any])

        async with asyncio.timeout(DEADLINE_S):
            while await status(client) != "durable":  # noqa: ASYNC110  # a client can only ask again
                await asyncio.sleep(LOOK_EVERY_S)
        newest = checkpoints.latest(cluster.run_dir / "checkpoints", 0)
        assert newest is not None
        told = await fetch_lineage(Target(cluster.nats_url, "run feedback"), newest.manifest.version, None)

    assert (told.version, told.num_unknown) == (2, 0), "an example and a preference"
    assert [batch.producer for batch in told.batches] == ["anonymous", "anonymous"]
    assert [source.id for batch in told.batches for source in batch.sources] == [given["id"]] * 2
