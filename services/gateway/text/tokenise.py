"""Checks a request against the served model, and turns its prompts into tokens."""

import asyncio
from dataclasses import dataclass

from services.gateway.http.errors import ApiError
from services.gateway.openai.requests import CompletionRequest, Prompt
from services.gateway.settings import GatewaySettings
from shared.model_files import ModelCard
from shared.text import TextTokenizer

_LONG_TEXT = 20_000
"""Characters from which tokenising goes to a thread: the event loop has tokens to stream."""


@dataclass(frozen=True, slots=True)
class TokenisedPrompt:
    """A prompt as the model gets it, and as `echo` shows it."""

    ids: tuple[int, ...]
    text: str


def check_limits(request: CompletionRequest, card: ModelCard, settings: GatewaySettings) -> None:
    """Raises ApiError when the request asks for another model, or for more than is allowed."""
    if request.model != card.name:
        raise ApiError(
            404, f"the model {request.model!r} does not exist", param="model", code="model_not_found"
        )
    num_choices = len(request.prompt) * request.n
    if num_choices > settings.max_choices:
        message = f"{num_choices} choices (prompts times n), at most {settings.max_choices} are allowed"
        raise ApiError(400, message, param="n" if request.n > 1 else "prompt", code="invalid_value")
    if any(len(stop) > settings.max_stop_length for stop in request.stop):
        message = f"parameter 'stop': at most {settings.max_stop_length} characters are allowed"
        raise ApiError(400, message, param="stop", code="invalid_value")


async def tokenise(
    request: CompletionRequest, tokenizer: TextTokenizer, card: ModelCard
) -> list[TokenisedPrompt]:
    """The request's prompts as tokens. Raises ApiError when one cannot be completed by this model."""
    prompts = []
    for prompt in request.prompt:
        ids = await _encode(prompt, tokenizer) or _empty_prompt(card)
        _check_ids(ids, card)
        _check_length(len(ids), request.max_tokens, card)
        text = prompt if isinstance(prompt, str) else tokenizer.decode(ids)
        prompts.append(TokenisedPrompt(tuple(ids), text))
    return prompts


async def _encode(prompt: Prompt, tokenizer: TextTokenizer) -> list[int]:
    if isinstance(prompt, list):
        return prompt
    if len(prompt) < _LONG_TEXT:
        return tokenizer.encode(prompt)
    return await asyncio.to_thread(tokenizer.encode, prompt)


def _empty_prompt(card: ModelCard) -> list[int]:
    """What stands for a prompt without tokens: the token with which texts begin (or end)."""
    if card.bos_token_id is not None:
        return [card.bos_token_id]
    if card.eos_token_ids:
        return [card.eos_token_ids[0]]
    raise ApiError(400, "the prompt is empty, and the model has no token to begin with", param="prompt")


def _check_ids(ids: list[int], card: ModelCard) -> None:
    wrong = next((token for token in ids if not 0 <= token < card.vocab_size), None)
    if wrong is not None:
        message = f"token id {wrong} is out of range: the vocabulary has {card.vocab_size} tokens"
        raise ApiError(400, message, param="prompt", code="invalid_value")


def _check_length(num_tokens: int, max_tokens: int, card: ModelCard) -> None:
    if num_tokens + max_tokens > card.context_length:
        raise ApiError(
            400,
            f"This model's maximum context length is {card.context_length} tokens, however you requested "
            f"{num_tokens + max_tokens} tokens ({num_tokens} in your prompt; {max_tokens} for the "
            "completion). Please reduce your prompt or max_tokens.",
            param="prompt",
            code="context_length_exceeded",
        )
