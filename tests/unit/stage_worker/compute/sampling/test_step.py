"""Drawing inside a static step: the tokens of `draw`, whatever the bucket and the company."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.stage_worker.compute.graphs import run_again
from services.stage_worker.compute.sampling.draw import draw
from services.stage_worker.compute.sampling.sequences import SequenceState
from services.stage_worker.compute.sampling.step import NO_TOKEN, Drawing, Kind, StepSampler
from shared.messages.inference import Sampling

MAX_ROWS, VOCAB_SIZE = 8, 61

SAMPLINGS = st.builds(
    Sampling,
    max_tokens=st.just(9),
    temperature=st.sampled_from([0.0, 1e-9, 0.3, 1.0, 1.9]),
    top_p=st.sampled_from([1.0, 1.0, 0.95, 0.5, 0.01]),
    top_k=st.sampled_from([0, 0, 1, 7, 60, 200]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.4]),
    seed=st.integers(-(2**63), 2**63 - 1),
)


def sampler_of(dtype: torch.dtype) -> StepSampler:
    sampler = StepSampler(max_rows=MAX_ROWS, vocab_size=VOCAB_SIZE, dtype=dtype, device="cpu")
    sampler.prepare(run_again, [2, 4, MAX_ROWS])
    return sampler


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=40)
@given(
    samplings=st.lists(SAMPLINGS, min_size=1, max_size=MAX_ROWS),
    index=st.integers(0, 8),
    seed=st.integers(0, 10_000),
    ties=st.booleans(),
)
def test_the_draws_are_those_of_rows_that_run_as_they_come(
    dtype: torch.dtype, samplings: list[Sampling], index: int, seed: int, ties: bool
) -> None:
    logits = torch.randn(MAX_ROWS, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 4
    logits = (logits.round() if ties else logits).to(dtype)
    sampler = sampler_of(dtype)
    sampler.logits_RV.copy_(logits)
    num_rows = next(size for size in (2, 4, MAX_ROWS) if size >= len(samplings))
    drawn = sampler.draw(num_rows, [Drawing(one, index) for one in samplings])
    states = [SequenceState("g", one) for one in samplings]
    assert drawn.wait() == draw(logits[: len(samplings)], states, [index] * len(samplings))
    assert sampler.tokens_R[: len(samplings)].tolist() == drawn.wait()


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_p": 0.5}], ids=str)
@pytest.mark.parametrize("sick", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_has_no_token_and_leaves_the_others_theirs(
    options: dict[str, Any], sick: float
) -> None:
    sampler, sampling = sampler_of(torch.float32), Sampling(max_tokens=3, **options)
    sampler.logits_RV.copy_(torch.randn(MAX_ROWS, VOCAB_SIZE, generator=torch.Generator().manual_seed(3)))
    well = sampler.draw(4, [Drawing(sampling, 0)] * 3).wait()
    sampler.logits_RV[1, 5] = sick
    assert sampler.draw(4, [Drawing(sampling, 0)] * 3).wait() == [well[0], NO_TOKEN, well[2]]


def test_nothing_is_sorted_for_rows_that_draw_from_all_tokens() -> None:
    kinds = [
        Drawing(Sampling(max_tokens=1, temperature=0.0, top_k=3), 0).kind,
        Drawing(Sampling(max_tokens=1), 0).kind,
        Drawing(Sampling(max_tokens=1, min_p=0.1), 0).kind,
    ]
    assert kinds == [Kind.GREEDY, Kind.FROM_ALL, Kind.FROM_LIKELIEST]


def test_a_draw_is_followed_by_the_next_one_until_the_last() -> None:
    first = Drawing(Sampling(max_tokens=2), 0)
    second = first.following()
    assert second == Drawing(first.sampling, 1)
    assert second is not None
    assert second.following() is None
