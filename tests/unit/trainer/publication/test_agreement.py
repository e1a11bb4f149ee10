"""Whether what serves is what trains."""

from math import inf, nan

import pytest

from services.trainer.publication.agreement import NUM_TOKENS, TOLERANCES, disagreement, tokens_to_score
from shared.messages.inference import TokenLogprob


def served(*logprobs: float | None) -> list[TokenLogprob]:
    return [TokenLogprob(token=7, logprob=logprob) for logprob in logprobs]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_rounding_is_no_disagreement_and_more_is(dtype: str) -> None:
    tolerance = TOLERANCES[dtype]
    assert disagreement((-1.0, -2.0), served(-1.0, -2.0 - 0.9 * tolerance), dtype) == ""
    assert dtype in disagreement((-1.0, -2.0), served(-1.0, -2.0 - 1.1 * tolerance), dtype)


def test_what_is_no_number_disagrees() -> None:
    assert disagreement((nan, -2.0), served(-1.0, -2.0), "float32")


def test_two_that_are_both_minus_infinity_agree() -> None:
    assert disagreement((-inf, -2.0), served(-inf, -2.0), "float32") == ""
    assert disagreement((-inf, -2.0), served(-1.0, -2.0), "float32")


@pytest.mark.parametrize(("vocab_size", "context_length"), [(10, 100), (50_000, 4), (3, 2)])
def test_the_tokens_are_the_models_own_and_fit_it(vocab_size: int, context_length: int) -> None:
    tokens = tokens_to_score(vocab_size, context_length)
    assert len(tokens) == min(NUM_TOKENS, context_length)
    assert all(0 <= token < vocab_size for token in tokens)
