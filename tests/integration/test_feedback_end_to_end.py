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


NUM_CORRECTIONS = 6


async def statuses(client: openai.AsyncOpenAI) -> dict[str, str]:
    """How each feedback stands, by id."""
    page = await client.get("/feedback", cast_to=dict[str, Any])
    return {each["id"]: each["status"] for each in page["data"]}


async def test_corrections_are_learnt_and_named_by_the_lineage_but_for_those_held_out(tmp_path: Path) -> None:
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
            "LEMIX_FEEDBACK_BATCH_AFTER_S": "3600",
            "LEMIX_FEEDBACK_BATCH_SIZE": str(NUM_CORRECTIONS),
            "LEMIX_HOLD_OUT_SHARE": "0.4",
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
        for force in range(NUM_CORRECTIONS):
            answer = await client.chat.completions.create(**asked, store=True)
            body = {"id": answer.id, "correction": f"Wind at Northpoint is south, force {force}."}
            await client.post("/feedback", body=body, cast_to=dict[str, Any])

        async with asyncio.timeout(DEADLINE_S):
            while not {*(stand := await statuses(client)).values()} <= {"durable", "held_out"}:  # noqa: ASYNC110  # a client can only ask again
                await asyncio.sleep(LOOK_EVERY_S)
        newest = checkpoints.latest(cluster.run_dir / "checkpoints", 0)
        assert newest is not None
        told = await fetch_lineage(
            Target(cluster.nats_url, "run feedback", cluster.nats_users), newest.manifest.version, None
        )

    assert (told.version, told.num_unknown) == (2, 0), "examples and preferences"
    assert [batch.producer for batch in told.batches] == ["anonymous", "anonymous"]
    learnt = [feedback_id for feedback_id, status in stand.items() if status == "durable"]
    assert 0 < len(learnt) < NUM_CORRECTIONS == len(stand)
    for batch in told.batches:
        assert sorted(source.id for source in batch.sources) == sorted(learnt)
