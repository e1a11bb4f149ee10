"""Log-probabilities of tokens."""

import json

import torch
from msgspec import structs

from services.stage_worker.compute.sampling.logprobs import LEAST_LOGPROB, logprobs


def random_logits(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, 50, generator=torch.Generator().manual_seed(5)) * 3


def test_logprobs_are_the_models_own() -> None:
    logits, tokens = random_logits(3), [4, 0, 49]
    expected = torch.log_softmax(logits, dim=-1)
    told = logprobs(logits, tokens, [2, 0, 5])
    assert [one.token for one in told] == tokens
    for row, one in enumerate(told):
        assert one.logprob == expected[row, tokens[row]].item()
    assert [len(one.top) for one in told] == [2, 0, 5]
    values, ids = expected[2].topk(5)
    assert told[2].top == tuple(zip(ids.tolist(), values.tolist(), strict=True))


def test_more_than_the_vocabulary_are_not_told() -> None:
    assert len(logprobs(torch.zeros(1, 3), [0], [20])[0].top) == 3


def test_what_is_impossible_can_be_said_in_json() -> None:
    (one,) = logprobs(torch.tensor([[0.0, -torch.inf]]), [1], [2])
    assert (one.logprob, one.top[1]) == (LEAST_LOGPROB, (1, LEAST_LOGPROB))
    json.dumps(structs.asdict(one), allow_nan=False)
