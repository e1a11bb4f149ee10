"""What a request asks of the model: one sequence for each prompt and each of its `n` choices."""

from collections.abc import Sequence as Many

from services.gateway.cluster_client import SequenceSpec
from services.gateway.openai.requests import CompletionRequest
from services.gateway.text.detokenise import Sequence
from services.gateway.text.tokenise import TokenisedPrompt
from shared.messages.inference import Sampling
from shared.model_files import ModelCard
from shared.text import TextTokenizer

_NUM_SEEDS = 2**63


def specs_of(
    request: CompletionRequest, prompts: Many[TokenisedPrompt], card: ModelCard, seed: int
) -> list[SequenceSpec]:
    """The sequences to run, choice by choice; the k-th choice of every prompt draws with `seed` + k."""
    return [
        SequenceSpec(
            prompt=prompt.ids,
            sampling=_sampling(request, card, (seed + k) % _NUM_SEEDS),
            prompt_logprobs=request.echo and request.logprobs is not None,
        )
        for prompt in prompts
        for k in range(request.n)
    ]


def sequences_of(
    request: CompletionRequest, prompts: Many[TokenisedPrompt], tokenizer: TextTokenizer
) -> list[Sequence]:
    """The book-keeping of the same sequences, in the same order."""
    return [
        Sequence(
            tokenizer,
            prompt.ids,
            max_tokens=request.max_tokens,
            stops=request.stop,
            with_logprobs=request.logprobs is not None,
            echo=prompt.text if request.echo else None,
        )
        for prompt in prompts
        for _ in range(request.n)
    ]


def _sampling(request: CompletionRequest, card: ModelCard, seed: int) -> Sampling:
    return Sampling(
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=seed,
        stop_token_ids=card.eos_token_ids,
        num_logprobs=request.logprobs,
    )
