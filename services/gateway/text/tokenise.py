"""Turns prompts into tokens, and checks them against the served model."""

from collections.abc import Sequence
from dataclasses import dataclass

from services.gateway.context import GatewayContext
from services.gateway.http.errors import ApiError
from shared.model_files import ModelCard

Prompt = str | list[int]


@dataclass(frozen=True, slots=True)
class TokenisedPrompt:
    """A prompt as the model gets it, and as `echo` shows it."""

    ids: tuple[int, ...]
    text: str


async def tokenise(
    prompts: Sequence[Prompt], max_tokens: int, context: GatewayContext
) -> tuple[TokenisedPrompt, ...]:
    """The prompts as tokens, each with room for `max_tokens` more.

    Raises ApiError when one cannot be completed by this model.
    """
    tokenizer, card = context.tokenizer, context.card

    def read(prompt: Prompt) -> TokenisedPrompt:
        ids = prompt if isinstance(prompt, list) else tokenizer.encode(prompt)
        ids = ids or _empty_prompt(card)
        _check_ids(ids, card)
        _check_length(len(ids), max_tokens, card)
        return TokenisedPrompt(tuple(ids), prompt if isinstance(prompt, str) else tokenizer.decode(ids))

    for prompt in prompts:
        _check_size(prompt, max_tokens, context)
    return await context.text_threads.run(
        sum(map(len, prompts)), lambda: tuple(read(prompt) for prompt in prompts)
    )


async def tokenise_rendered(text: str, max_tokens: int, context: GatewayContext) -> TokenisedPrompt:
    """A conversation that the chat template has rendered: it has all special tokens that it needs.

    Raises ApiError when it leaves no room for `max_tokens` more.
    """
    _check_size(text, max_tokens, context, param="messages")
    ids = await context.text_threads.run(len(text), lambda: context.tokenizer.encode_part(text))
    ids = ids or _empty_prompt(context.card)
    _check_length(len(ids), max_tokens, context.card, param="messages")
    return TokenisedPrompt(tuple(ids), text)


def _empty_prompt(card: ModelCard) -> list[int]:
    """The stand-in for a prompt without tokens: the token with which texts begin (or end)."""
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


def _check_size(prompt: Prompt, max_tokens: int, context: GatewayContext, *, param: str = "prompt") -> None:
    """Refuse before it costs time what would be too long in any case."""
    card = context.card
    if isinstance(prompt, list):
        _check_length(len(prompt), max_tokens, card, param=param)
        return
    longest = context.tokenizer.max_characters_per_token
    if longest is not None and len(prompt) > (card.context_length - max_tokens) * longest:
        raise ApiError(
            400,
            f"This model's maximum context length is {card.context_length} tokens, however your prompt has "
            f"{len(prompt)} characters, more than {longest} for each token beside the {max_tokens} of the "
            "completion. Please reduce your prompt or max_tokens.",
            param=param,
            code="context_length_exceeded",
        )


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
