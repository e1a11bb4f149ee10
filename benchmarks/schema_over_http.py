"""Eight chats over HTTP whose answers are JSON of a schema, against eight that may say anything; one node."""

import asyncio
import time
from pathlib import Path
from typing import Any

from benchmarks.models import text_model_folder
from benchmarks.report import spread
from benchmarks.workload import BATCH_SIZE, MAX_TOKENS
from lemix.client import ApiClient, served_model
from lemix.launcher import LocalCluster
from lemix.run_folder import clear
from lemix.topology import ClusterOptions

NUM_ROUNDS = 8
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


async def measure(name: str, work: Path, schema: Any) -> dict[str, Any]:
    """Rounds of both sides in turn: decoded tokens a second, from the last first token to the last token."""
    folder = work / f"{name}-chat"
    text = text_model_folder(name, work / "models")
    options = ClusterOptions(
        name=f"schema-{name}",
        runs_dir=work,
        nodes=1,
        stages=1,
        model=str(text),
        extra_env={"LEMIX_CHAT_TEMPLATE": str(_template(folder)), "LEMIX_DTYPE": "float32"},
    )
    clear(options.run_dir)
    sides: dict[str, dict[str, Any]] = {
        "with_schema": {"response_format": _response_format(schema)},
        "without": {"ignore_eos": True},
    }
    rates: dict[str, list[float]] = {side: [] for side in sides}
    async with (
        LocalCluster(options) as cluster,
        ApiClient(cluster.api_url, model=await served_model(cluster.api_url)) as client,
    ):
        for number in range(-1, NUM_ROUNDS):
            for side in sorted(sides, reverse=bool(number % 2)):
                rate = await _round(client, sides[side])
                if number >= 0:  # The first round warms up.
                    rates[side].append(rate)
    spreads = {side: spread(measured) for side, measured in rates.items()}
    ratio = spreads["without"]["median"] / spreads["with_schema"]["median"]
    return {"decode_tokens_per_s": spreads, "time_with_to_without": ratio}


def _template(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "chat_template.jinja"
    path.write_text(TEMPLATE)
    return path


def _response_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


async def _round(client: ApiClient, parameters: dict[str, Any]) -> float:
    start_s = time.monotonic()
    answers = await asyncio.gather(
        *(
            client.chat(f"Customer {number}?", max_tokens=MAX_TOKENS, seed=number, **parameters)
            for number in range(BATCH_SIZE)
        )
    )
    end_s = time.monotonic()
    assert all(answer.completion_tokens == MAX_TOKENS for answer in answers), "no answer ended early"
    first_s = start_s + max(answer.ttft_s for answer in answers)
    return BATCH_SIZE * (MAX_TOKENS - 1) / (end_s - first_s)
