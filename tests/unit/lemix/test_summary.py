import json
from dataclasses import replace

import pytest

from lemix.client import Completion
from lemix.load import Outcome, PlannedRequest
from lemix.summary import ServedLoss, Summary, Training, percentile, summarise

TRAINING = Training(batches_published=4, batches_applied=4, optimizer_steps=4, tokens_per_s=100.0)
COMPLETION = Completion(
    text="abc",
    finish_reason="length",
    prompt_tokens=2,
    completion_tokens=3,
    ttft_s=0.1,
    tbt_s=(0.01, 0.03),
    weights_versions=(1, 2),
)


ASKED = PlannedRequest(at_s=0.0, prompt="p", max_tokens=3)
CHATTED = replace(ASKED, is_chat=True)


def summary_of(
    outcomes: list[Outcome], training: Training = TRAINING, loss: tuple[float, float] = (3.0, 2.0)
) -> Summary:
    before, after = loss
    return summarise(
        outcomes,
        load_s=2.0,
        wall_s=5.0,
        training=training,
        served_loss=ServedLoss(before=before, after=after),
    )


@pytest.mark.parametrize(
    ("fraction", "value"), [(0.0, 1), (0.5, 50), (0.505, 51), (0.99, 99), (0.991, 100), (1.0, 100)]
)
def test_a_percentile_is_the_smallest_value_that_enough_do_not_exceed(fraction: float, value: int) -> None:
    assert percentile([float(n) for n in range(100, 0, -1)], fraction) == value


def test_a_percentile_of_nothing_is_unknown() -> None:
    assert percentile([], 0.5) is None


def test_the_summary_has_the_keys_that_were_promised() -> None:
    outcomes = [
        Outcome(ASKED, COMPLETION, "", 1.0),
        Outcome(ASKED, replace(COMPLETION, ttft_s=0.3, weights_versions=(5, 7)), "", 2.0),
        Outcome(CHATTED, None, "HTTP 503: full", 2.0),
    ]
    assert json.loads(summary_of(outcomes).model_dump_json()) == {
        "requests": {"sent": 3, "chat": 1, "completed": 2, "failed": 1},
        "ttft_s": {"p50": 0.1, "p99": 0.3},
        "tbt_s": {"p50": 0.01, "p99": 0.03},
        "completion_tokens_per_s": 3.0,
        "training": {
            "batches_published": 4,
            "batches_applied": 4,
            "optimizer_steps": 4,
            "tokens_per_s": 100.0,
        },
        "served_loss": {"before": 3.0, "after": 2.0},
        "weights_version": {"first": 1, "last": 7},
        "wall_s": 5.0,
    }


def test_a_good_run_has_no_fault() -> None:
    assert summary_of([Outcome(ASKED, COMPLETION, "", 1.0)]).faults() == []


def test_each_broken_promise_is_a_fault() -> None:
    training = TRAINING.model_copy(update={"batches_applied": 3})
    faults = summary_of([Outcome(ASKED, None, "HTTP 503: full", 1.0)], training, (2.0, 2.0)).faults()
    assert faults == [
        "1 of 1 requests failed",
        "3 of 4 training batches were applied",
        "the served loss did not fall: 2.000 before, 2.000 after",
    ]
