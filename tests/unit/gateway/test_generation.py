"""Which sequences a generation runs."""

import pytest
from msgspec import structs

from services.gateway.generation import GenerationRequest, detokenisers_of, specs_of
from services.gateway.text.tokenise import TokenisedPrompt
from shared.messages.inference import Sampling
from tests.support.gateway import TOKENIZER

PROMPTS = (TokenisedPrompt((1, 2), "a"), TokenisedPrompt((3,), "b"))


def asked(*, seed: int = 0, num_logprobs: int | None = None, echo: bool = False) -> GenerationRequest:
    sampling = Sampling(max_tokens=8, seed=seed, num_logprobs=num_logprobs)
    return GenerationRequest(answer_id="a-1", prompts=PROMPTS, sampling=sampling, num_choices=2, echo=echo)


def test_choices_of_a_prompt_differ_in_their_seed_only() -> None:
    request = asked(seed=5)
    specs = specs_of(request)
    assert [(spec.prompt, spec.sampling.seed) for spec in specs] == [
        ((1, 2), 5),
        ((1, 2), 6),
        ((3,), 5),
        ((3,), 6),
    ]
    assert {structs.replace(spec.sampling, seed=0) for spec in specs} == {Sampling(max_tokens=8)}
    assert len(detokenisers_of(request, TOKENIZER)) == 4


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63 - 1])
def test_seeds_stay_within_63_bits(seed: int) -> None:
    assert all(0 <= spec.sampling.seed < 2**63 for spec in specs_of(asked(seed=seed)))


@pytest.mark.parametrize(("num_logprobs", "echo"), [(1, False), (None, True), (1, True)])
def test_a_prompt_is_scored_only_when_its_scores_are_shown(num_logprobs: int | None, echo: bool) -> None:
    request = asked(num_logprobs=num_logprobs, echo=echo)
    assert {spec.prompt_logprobs for spec in specs_of(request)} == {num_logprobs is not None and echo}
