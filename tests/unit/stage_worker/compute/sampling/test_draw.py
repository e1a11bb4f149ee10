"""Draws from logits."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from services.stage_worker.compute.sampling import draw as drawing
from services.stage_worker.compute.sampling.draw import uniform
from services.stage_worker.compute.sampling.sequences import SequenceState
from shared.messages.inference import Sampling

PROBABILITIES = (0.4, 0.05, 0.25, 0.1, 0.2)
NUM_DRAWS = 4000


def draw(logits_RV: Tensor, samplings: Sequence[Sampling], indices: Sequence[int]) -> list[int]:
    """A token for each row, of sequences that have drawn nothing yet."""
    return drawing.draw(logits_RV, [SequenceState("g", one) for one in samplings], indices)


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


@pytest.mark.parametrize(("top_k", "kept"), [(1, {0}), (2, {0, 2}), (4, {0, 2, 4, 3}), (99, {0, 1, 2, 3, 4})])
def test_top_k_keeps_so_many(top_k: int, kept: set[int]) -> None:
    assert set(drawn(logits_of(PROBABILITIES), seed=4, top_k=top_k)) == kept


@pytest.mark.parametrize(
    ("min_p", "kept"), [(0.1, {0, 1, 2, 3, 4}), (0.2, {0, 2, 3, 4}), (0.6, {0, 2}), (0.7, {0}), (1.0, {0})]
)
def test_min_p_is_a_share_of_the_likeliest(min_p: float, kept: set[int]) -> None:
    assert set(drawn(logits_of(PROBABILITIES), seed=5, min_p=min_p)) == kept


def as_transformers_warps(logits_RV: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities after the library's own processors, in its order."""
    warpers = [TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    for warper in warpers:
        logits_RV = warper(None, logits_RV)
    return logits_RV.softmax(-1)


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.6},
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.05},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.4, "top_k": 30, "min_p": 0.02},
    {"temperature": 1.3, "top_p": 0.7, "min_p": 0.1},
    {"temperature": 2.0, "top_k": 40, "top_p": 0.95, "min_p": 0.03},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_may_be_drawn_and_how_often_is_what_transformers_has(options: dict[str, Any]) -> None:
    logits, sampling = random_logits(5), Sampling(max_tokens=1, **options)
    weights_RV = drawing._probabilities(logits, [sampling] * 5)
    expected = as_transformers_warps(logits, sampling)
    assert torch.equal(weights_RV > 0, expected > 0)
    assert torch.allclose(weights_RV / weights_RV.sum(-1, keepdim=True), expected, atol=1e-6)


def test_a_uniform_takes_the_token_in_whose_share_of_the_vocabulary_it_lies() -> None:
    weights = torch.tensor([[2.0, 0.0, 1.0, 5.0, 0.0]])
    places = [(0.0, 0), (0.249, 0), (0.25, 2), (0.374, 2), (0.375, 3), (1 - 2**-53, 3)]
    for uniform_, token in places:
        assert drawing.choose(weights, torch.tensor([[uniform_]], dtype=torch.float64)).item() == token


def test_a_draw_does_not_depend_on_its_company() -> None:
    """Rows of all kinds of options together, alone, and in any order."""
    kinds: list[dict[str, Any]] = [
        *OPTIONS,
        {},
        {"temperature": 0.0},
        {"temperature": 0.0, "logit_bias": ((3, 9.0),)},
        {"frequency_penalty": 1.5, "presence_penalty": -1.0, "repetition_penalty": 1.8},
        {"min_tokens": 6, "stop_token_ids": (1, 4)},
        {"top_p": 0.6, "min_p": 0.1, "top_k": 9, "repetition_penalty": 0.7, "logit_bias": ((7, 2.0),)},
    ]
    logits = random_logits(len(kinds))
    states = [
        SequenceState(
            "g", Sampling(max_tokens=9, seed=seed, **kind), prompt={3, 8}, generated=Counter([2, 2, 5])
        )
        for seed, kind in enumerate(kinds)
    ]
    indices = [3 + row % 4 for row in range(len(kinds))]
    alone = [
        drawing.draw(logits[row : row + 1], [states[row]], [indices[row]])[0] for row in range(len(kinds))
    ]
    assert drawing.draw(logits, states, indices) == alone
    for order in (list(reversed(range(len(kinds)))), [5, 2, 11, 9], [12, 0]):
        told = drawing.draw(logits[order], [states[row] for row in order], [indices[row] for row in order])
        assert told == [alone[row] for row in order]


def test_uniforms_fill_the_unit_interval_evenly() -> None:
    numbers = [uniform(42, index) for index in range(NUM_DRAWS)]
    assert all(0 <= number < 1 for number in numbers)
    assert chi_square([int(number * 20) for number in numbers], [1 / 20] * 20) < 43.9  # 1 in 1000
    assert len(set(numbers)) == NUM_DRAWS
