"""What training has made of a model, taken out of its run: transformers gives the same log-probabilities."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lemix.export import export_checkpoint
from shared import checkpoints
from tests.integration.test_trainer_with_stages import Applied, durable, publish, running_trainer
from tests.support.models import save_tiny_model
from tests.support.node import running_node
from tests.support.training import ADAMW

PROMPT = [3, 14, 15, 92, 65, 35]


def logprobs_of(folder: Path, tokens: list[int]) -> list[float]:
    """Of each token but the first, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        table = model(torch.tensor([tokens])).logits[0].log_softmax(dim=-1)
    return [table[place, token].item() for place, token in enumerate(tokens[1:])]


@pytest.mark.parametrize("adapter", [{}, {"adapter": "lora", "lora_rank": 4}], ids=["whole", "lora"])
async def test_an_exported_version_answers_as_the_node_does(adapter: dict[str, Any], tmp_path: Path) -> None:
    model_folder, run_dir, exported = tmp_path / "model", tmp_path / "run", tmp_path / "exported"
    run_dir.mkdir()
    save_tiny_model("llama_tied", model_folder)
    applied = Applied()
    async with running_node(model_folder, 2, run_dir, **ADAMW, **adapter) as node:
        await applied.start(node)
        async with running_trainer(node, model_folder, run_dir):
            await publish(node, 0, 3)
            await durable(run_dir, version=3)
            answer = await node.complete(PROMPT, max_tokens=4, num_logprobs=0, prompt_logprobs=True)
    (checkpoint,) = checkpoints.checkpoints(run_dir / "checkpoints", 0)[:1]
    export_checkpoint(checkpoint, exported)

    tokens = [*PROMPT, *answer.token_ids]
    told = [token.logprob for token in (*answer.prompt, *answer.tokens)]
    assert told == pytest.approx(logprobs_of(exported, tokens), abs=1e-4)
    assert told != pytest.approx(logprobs_of(model_folder, tokens), abs=1e-4), "training has changed it"
    assert checkpoint.manifest.adapter == adapter.get("adapter", "")
    assert {path.name for path in exported.iterdir()} >= {"config.json"}
    assert not any("optimizer" in path.name or "adapter" in path.name for path in exported.iterdir())
