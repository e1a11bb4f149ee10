"""Draws and log-probabilities from logits."""

from typing import Any

import pytest
import torch
from torch import Tensor

from services.stage_worker.sampling import draw, finish_reason, logprobs, uniform
from shared.messages.inference import Sampling

PROBABILITIES = (0.4, 0.05, 0.25, 0.1, 0.2)
NUM_DRAWS = 4000


def logits_of(probabilities: tuple[float, ...]) -> Tensor:
    return torch.tensor([probabilities]).log()


def drawn(logits_1V: Tensor, **sampling: Any) -> list[int]:
    """`NUM_DRAWS` draws of one sequence, as if its logits never changed."""
    one = Sampling(max_tokens=NUM_DRAWS, **sampling)
    return draw(logits_1V.expand(NUM_DRAWS, -1), [one] * NUM_DRAWS, range(NUM_DRAWS))


def chi_square(tokens: list[int], probabilities: list[float]) -> float:
    counts = torch.tensor(tokens).bincount(minlength=len(probabilities))
    expected = torch.tensor(probabilities) * len(tokens)
    return float(((counts - expected) ** 2 / expected).sum())


def random_logits(num_rows: int) -> Tensor:
    return torch.randn(num_rows, 50, generator=torch.Generator().manual_seed(5)) * 3


def test_temperature_0_takes_the_likeliest() -> None:
    logits = random_logits(4)
    greedy = Sampling(max_tokens=1, temperature=0.0)
    assert draw(logits, [greedy] * 4, [0, 1, 2, 3]) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("seed", [0, 1, 123456789, 2**63 - 1, -(2**63)])
def test_draws_are_distributed_as_the_probabilities(seed: int) -> None:
    tokens = drawn(logits_of(PROBABILITIES), seed=seed)
    assert chi_square(tokens, list(PROBABILITIES)) < 18.5  # 4 degrees of freedom: 1 in 1000 is above


def test_temperature_flattens_and_sharpens() -> None:
    for temperature in (0.5, 2.0):
        powers = [probability ** (1 / temperature) for probability in PROBABILITIES]
        expected = [power / sum(powers) for power in powers]
        tokens = drawn(logits_of(PROBABILITIES), seed=3, temperature=temperature)
        assert chi_square(tokens, expected) < 18.5


def test_neighbouring_seeds_draw_independently() -> None:
    """The first draws of many sequences are as well distributed as many draws of one."""
    samplings = [Sampling(max_tokens=1, seed=seed) for seed in range(NUM_DRAWS)]
    tokens = draw(logits_of(PROBABILITIES).expand(NUM_DRAWS, -1), samplings, [0] * NUM_DRAWS)
    assert chi_square(tokens, list(PROBABILITIES)) < 18.5


@pytest.mark.parametrize(
    ("top_p", "nucleus"),
    [
        (1e-60, {0}),
        (0.3, {0}),
        (0.39, {0}),
        (0.41, {0, 2}),
        (0.64, {0, 2}),
        (0.66, {0, 2, 4}),
        (0.9, {0, 2, 4, 3}),
        (0.96, {0, 1, 2, 3, 4}),
        (1.0, {0, 1, 2, 3, 4}),
    ],
)
def test_top_p_keeps_exactly_the_nucleus(top_p: float, nucleus: set[int]) -> None:
    tokens = drawn(logits_of(PROBABILITIES), seed=8, top_p=top_p)
    assert set(tokens) == nucleus
    mass = sum(PROBABILITIES[token] for token in nucleus)
    kept = sorted(nucleus)
    places = [kept.index(token) for token in tokens]
    assert chi_square(places, [PROBABILITIES[token] / mass for token in kept]) < 18.5


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-38, 1e-6])
def test_the_coldest_temperatures_are_as_good_as_greedy(temperature: float) -> None:
    logits = random_logits(3)
    cold = Sampling(max_tokens=1, temperature=temperature)
    assert draw(logits, [cold] * 3, [0, 0, 0]) == logits.argmax(-1).tolist()


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([[0.0, float("-inf"), 0.0, float("-inf")]])
    assert set(drawn(logits, seed=1)) == {0, 2}


def test_a_draw_does_not_depend_on_its_company() -> None:
    logits = random_logits(6)
    samplings = [
        Sampling(max_tokens=9, temperature=temperature, top_p=top_p, seed=seed)
        for seed, (temperature, top_p) in enumerate(
            [(1.0, 1.0), (0.0, 1.0), (0.7, 0.5), (2.0, 0.9), (1.0, 0.1), (1.3, 1.0)]
        )
    ]
    indices = [0, 5, 2, 8, 1, 1]
    alone = [
        draw(logits[row : row + 1], [samplings[row]], [indices[row]])[0] for row in range(len(samplings))
    ]
    assert draw(logits, samplings, indices) == alone
    backwards = draw(logits.flip(0), samplings[::-1], indices[::-1])
    assert backwards == alone[::-1]


def test_uniforms_fill_the_unit_interval_evenly() -> None:
    numbers = [uniform(42, index) for index in range(NUM_DRAWS)]
    assert all(0 <= number < 1 for number in numbers)
    assert chi_square([int(number * 20) for number in numbers], [1 / 20] * 20) < 43.9  # 1 in 1000
    assert len(set(numbers)) == NUM_DRAWS


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


@pytest.mark.parametrize(
    ("token", "index", "expected"), [(7, 0, "stop"), (7, 2, "stop"), (1, 2, "length"), (1, 1, None)]
)
def test_a_stop_token_or_the_last_one_ends_the_answer(token: int, index: int, expected: str | None) -> None:
    assert finish_reason(token, index, Sampling(max_tokens=3, stop_token_ids=(7, 8))) == expected
