"""Turns prompts into tokens, and checks them against the served model."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.gateway.http.errors import ApiError
from shared.model_files import ModelCard
from shared.text import TextTokenizer

Prompt = str | list[int]

_LONG_TEXT = 20_000
"""Characters from which tokenising goes to a thread: the event loop has tokens to stream."""


@dataclass(frozen=True, slots=True)
class TokenisedPrompt:
    """A prompt as the model gets it, and as `echo` shows it."""

    ids: tuple[int, ...]
    text: str


async def tokenise(
    prompts: Sequence[Prompt], max_tokens: int, tokenizer: TextTokenizer, card: ModelCard
) -> tuple[TokenisedPrompt, ...]:
    """The prompts as tokens, each with room for `max_tokens` more.

    Raises ApiError when one cannot be completed by this model.
    """
    tokenised = []
    for prompt in prompts:
        ids = await _encode(prompt, tokenizer) or _empty_prompt(card)
        _check_ids(ids, card)
        _check_length(len(ids), max_tokens, card)
        text = prompt if isinstance(prompt, str) else tokenizer.decode(ids)
        tokenised.append(TokenisedPrompt(tuple(ids), text))
    return tuple(tokenised)


async def tokenise_rendered(
    text: str, max_tokens: int, tokenizer: TextTokenizer, card: ModelCard
) -> TokenisedPrompt:
    """A conversation that the chat template has rendered: it has all special tokens that it needs.

    Raises ApiError when it leaves no room for `max_tokens` more.
    """
    ids = await _encode_text(text, tokenizer.encode_part) or _empty_prompt(card)
    _check_length(len(ids), max_tokens, card, param="messages")
    return TokenisedPrompt(tuple(ids), text)


async def _encode(prompt: Prompt, tokenizer: TextTokenizer) -> list[int]:
    return prompt if isinstance(prompt, list) else await _encode_text(prompt, tokenizer.encode)


async def _encode_text(text: str, encode: Callable[[str], list[int]]) -> list[int]:
    return encode(text) if len(text) < _LONG_TEXT else await asyncio.to_thread(encode, text)


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


def _check_length(num_tokens: int, max_tokens: int, card: ModelCard, *, param: str = "prompt") -> None:
    if num_tokens + max_tokens > card.context_length:
        raise ApiError(
            400,
            f"This model's maximum context length is {card.context_length} tokens, however you requested "
            f"{num_tokens + max_tokens} tokens ({num_tokens} in your prompt; {max_tokens} for the "
            "completion). Please reduce your prompt or max_tokens.",
            param=param,
            code="context_length_exceeded",
        )
