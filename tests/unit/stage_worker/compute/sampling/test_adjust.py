"""What requests change in the logits, beside transformers' processors and plain loops."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from services.stage_worker.compute.sampling.adjust import adjust_, is_adjusted
from services.stage_worker.compute.sampling.sequences import SequenceState
from shared.messages.inference import Sampling

PROMPT, GENERATED = [3, 8, 8, 21], [5, 2, 5, 5, 8]
STOPS = (1, 40)


def random_logits(num_rows: int = 1) -> Tensor:
    return torch.randn(num_rows, 50, generator=torch.Generator().manual_seed(6)) * 3


def state(**sampling: Any) -> SequenceState:
    return SequenceState(
        "g", Sampling(max_tokens=99, **sampling), prompt=set(PROMPT), generated=Counter(GENERATED)
    )


def adjusted(one: SequenceState, logits: Tensor | None = None) -> Tensor:
    changed = random_logits() if logits is None else logits.clone()
    adjust_(changed, [one], [len(GENERATED)])
    return changed


def by_hand(logits: Tensor, sampling: Sampling) -> list[float]:
    """One row, token by token, as the OpenAI and transformers documents describe it."""
    numbers = logits[0].tolist()
    for token, bias in sampling.logit_bias:
        numbers[token] += bias
    for token in set(PROMPT + GENERATED):
        factor = sampling.repetition_penalty
        numbers[token] = numbers[token] / factor if numbers[token] > 0 else numbers[token] * factor
    for token in set(GENERATED):
        numbers[token] -= GENERATED.count(token) * sampling.frequency_penalty + sampling.presence_penalty
    if len(GENERATED) < sampling.min_tokens:
        for token in sampling.stop_token_ids:
            numbers[token] = -torch.inf
    return numbers


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    text = torch.tensor([PROMPT + GENERATED])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(text, random_logits())
    assert torch.allclose(adjusted(state(repetition_penalty=penalty)), expected)


def test_the_bias_is_that_of_transformers() -> None:
    text = torch.tensor([PROMPT + GENERATED])
    expected = SequenceBiasLogitsProcessor({(4,): 2.5, (9,): -100.0})(text, random_logits())
    assert torch.allclose(adjusted(state(logit_bias=((4, 2.5), (9, -100.0)))), expected)


@pytest.mark.parametrize("min_tokens", [0, 4, 5, 6, 20])
def test_no_end_before_min_tokens_as_in_transformers(min_tokens: int) -> None:
    text = torch.tensor([PROMPT + GENERATED])
    processor = MinNewTokensLengthLogitsProcessor(len(PROMPT), min_tokens, list(STOPS))
    expected = processor(text, random_logits())
    assert torch.equal(adjusted(state(min_tokens=min_tokens, stop_token_ids=STOPS)), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"frequency_penalty": 0.7},
        {"presence_penalty": -1.3},
        {"frequency_penalty": -2.0, "presence_penalty": 2.0},
        {
            "logit_bias": ((5, 4.0), (8, -7.0), (40, 30.0)),
            "repetition_penalty": 1.6,
            "frequency_penalty": 0.5,
            "presence_penalty": 0.25,
            "min_tokens": 9,
            "stop_token_ids": STOPS,
        },
    ],
    ids=str,
)
def test_all_of_them_in_their_order(options: dict[str, Any]) -> None:
    one = state(**options)
    assert adjusted(one)[0].tolist() == pytest.approx(by_hand(random_logits(), one.sampling))


def test_each_row_has_its_own_options() -> None:
    logits = random_logits(3)
    states = [state(logit_bias=((1, 1.0),)), state(), state(frequency_penalty=1.0)]
    changed = logits.clone()
    adjust_(changed, states, [0, 0, 0])
    for row, one in enumerate(states):
        alone = logits[row : row + 1].clone()
        adjust_(alone, [one], [0])
        assert torch.equal(changed[row : row + 1], alone)
    assert torch.equal(changed[1], logits[1])


def test_a_stop_token_that_the_model_does_not_have_forbids_nothing() -> None:
    assert torch.equal(adjusted(state(min_tokens=9, stop_token_ids=(50, 99))), random_logits())


@pytest.mark.parametrize(
    ("options", "index", "expected"),
    [
        ({}, 0, False),
        ({"temperature": 0.3, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "stop_token_ids": STOPS}, 0, False),
        ({"logit_bias": ((1, 1.0),)}, 0, True),
        ({"repetition_penalty": 1.1}, 0, True),
        ({"frequency_penalty": 0.1}, 0, True),
        ({"presence_penalty": 0.1}, 0, True),
        ({"min_tokens": 2, "stop_token_ids": STOPS}, 1, True),
        ({"min_tokens": 2, "stop_token_ids": STOPS}, 2, False),
        ({"min_tokens": 2}, 0, False),
    ],
    ids=str,
)
def test_only_rows_that_are_changed_are_looked_at(
    options: dict[str, Any], index: int, expected: bool
) -> None:
    assert is_adjusted(SequenceState("g", Sampling(max_tokens=9, **options)), index) is expected
