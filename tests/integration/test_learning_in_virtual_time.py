"""The embedded model learns on emulated devices as it does in a plain loop, and answers accordingly."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from lemix.simulation.cluster import SimulationOptions
from lemix.simulation.computing import embedded_model
from lemix.simulation.record import RequestRecord, RunRecord
from lemix.simulation.run import simulated
from lemix.simulation.workload import PlannedBatch, PlannedRequest, Workload
from lemix.studies.learning import learning
from lemix.studies.learning_texts import Text, bulletins
from lemix.studies.report import write
from lemix.studies.rows import aggregate
from shared.schedule import ScheduleName
from shared.settings import EMBEDDED_MODEL

LEARNING_RATE = 1e-3
NUM_BATCHES = 4
RUN_S = 0.4
"""Virtual seconds, of which training takes the first part."""


class Plainly:
    """The whole model, trained batch by batch."""

    def __init__(self) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32)
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
        )

    def loss(self, texts: Sequence[Text]) -> torch.Tensor:
        """Mean over all tokens but each text's first."""
        sums = [
            functional.cross_entropy(
                self.model(torch.tensor([text])).logits[0, :-1], torch.tensor(text[1:]), reduction="sum"
            )
            for text in texts
        ]
        return torch.stack(sums).sum() / sum(len(text) - 1 for text in texts)

    def train(self, texts: Sequence[Text]) -> None:
        self._optimizer.zero_grad()
        self.loss(texts).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()

    def losses(self, texts: Sequence[Text]) -> list[float]:
        with torch.no_grad():
            return [float(self.loss([text])) for text in texts]


def workload() -> Workload:
    """Two texts a batch, one after the other; requests all the time."""
    texts = Random(7).sample(bulletins(), 3 * NUM_BATCHES + 8)
    batches = [texts[2 * number : 2 * number + 2] for number in range(NUM_BATCHES)]
    asked = texts[2 * NUM_BATCHES :]
    return Workload(
        requests=tuple(
            PlannedRequest(RUN_S * place / len(asked), (len(text),), 1, prompts=(text,))
            for place, text in enumerate(asked)
        ),
        batches=tuple(PlannedBatch(tuple(map(len, batch)), examples=tuple(batch)) for batch in batches),
        release="closed",
    )


def run(nodes: int, policy: str, schedule: ScheduleName = "1f1b", **settings: Any) -> RunRecord:
    options = SimulationOptions(
        nodes=nodes,
        profile="gpt2-large@rtx6000ada",
        policy=policy,
        schedule=schedule,
        trainer_settings={"microbatches": 1, "learning_rate": LEARNING_RATE, **settings},
    )
    return simulated(options, workload(), embedded_model())


@cache
def losses_by_version() -> list[list[float]]:
    """Of every request, by the number of batches that a plain loop has trained on."""
    plain, planned = Plainly(), workload()
    texts = [text for request in planned.requests for text in request.prompts]
    found = [plain.losses(texts)]
    for batch in planned.batches:
        plain.train(batch.examples)
        found.append(plain.losses(texts))
    return found


def version_of(request: RequestRecord) -> int:
    (version,) = request.versions
    assert version is not None
    return version


def test_each_answer_has_the_loss_of_a_plain_loop_after_as_many_batches() -> None:
    record, expected = run(1, "round_robin"), losses_by_version()
    versions = [version_of(request) for request in record.requests]
    assert versions == sorted(versions)
    assert len(set(versions)) > 2
    assert versions[-1] == NUM_BATCHES
    for place, (request, version) in enumerate(zip(record.requests, versions, strict=True)):
        assert request.losses == pytest.approx((expected[version][place],), rel=1e-3)
    assert expected[NUM_BATCHES][-1] < 0.8 * expected[0][-1]


def test_separate_serves_old_weights_until_it_gets_those_of_the_node_that_trains() -> None:
    whole = {"weights_consistency": "pinned"}  # no answer is by weights of before and after a merge
    record = run(2, "separate:split=0.5", merge="average", merge_every=1, **whole)
    expected = losses_by_version()
    assert {request.nodes for request in record.requests} == {(0,)}
    assert {batch.node for batch in record.batches} == {1}
    versions = [version_of(request) for request in record.requests]
    assert set(versions) == {0, 2, 4}  # two batches of one of two nodes between merges
    for place, (request, version) in enumerate(zip(record.requests, versions, strict=True)):
        assert request.losses == pytest.approx((expected[version][place],), rel=1e-3)


def test_gradients_of_a_pipeline_without_flush_are_late_but_learnt_from() -> None:
    """Nobody waits for the first batch's step, so the last weights are not those of the plain loop."""
    record, expected = run(1, "round_robin", "async"), losses_by_version()
    last = record.requests[-1]
    assert version_of(last) == NUM_BATCHES
    (loss,) = last.losses
    assert loss is not None
    assert loss != pytest.approx(expected[NUM_BATCHES][-1], rel=1e-3)
    assert loss < 0.8 * expected[0][-1]


def test_the_quick_study_trains_under_two_policies_and_tells_their_losses(tmp_path: Path) -> None:
    study = learning(quick=True)
    rows = aggregate([(cell.labels, study.run(cell)) for cell in study.cells])
    path = write(study, rows, tmp_path, command="lemix study learning --quick", made="")
    results = json.loads((tmp_path / "learning.json").read_text())["rows"]
    by_policy = {result["labels"]["policy"]: result["metrics"] for result in results}
    assert set(by_policy) == {"lemix", "separate:split=training_rate"}
    for metrics in by_policy.values():
        assert metrics["batches_applied_share"] == 1.0
        assert metrics["inference_loss_9"] < metrics["inference_loss_0"]
    assert "| paper: lemix (gpt2-large) | 4.23 |" in path.read_text()
    assert {figure.name for figure in tmp_path.glob("*.png")} == {
        "learning-by-training_rate.png",
        "learning-over-time.png",
    }
