"""The routes POST /tokenize and /detokenize, as vLLM has them."""

from functools import partial

from fastapi import FastAPI
from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from services.gateway.context import GatewayContext
from services.gateway.openai.chat.messages import MAX_MESSAGES, Message
from services.gateway.openai.chat.prompt import num_characters, render
from services.gateway.openai.chat.template_variables import TemplateVariables
from services.gateway.openai.chat.tools import MAX_TOOLS, Tool
from services.gateway.openai.models import check_model
from services.gateway.openai.schema import RequestModel, invalid


class TokenizeRequest(RequestModel):
    """A text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] = Field(default_factory=list, max_length=MAX_MESSAGES, fail_fast=True)
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    add_generation_prompt: bool = True
    """End a conversation with what makes the model answer."""
    chat_template_kwargs: TemplateVariables = Field(default_factory=dict)
    """Variables for the chat template."""
    add_special_tokens: bool | None = None
    """Put the tokenizer's own tokens around; not given: around a prompt, as a template writes them itself."""

    @model_validator(mode="after")
    def _is_one_of_two(self) -> "TokenizeRequest":
        if (self.prompt is None) == (not self.messages):
            raise PydanticCustomError("text", "expected either 'prompt' or 'messages'")
        return self


class TokenizeAnswer(BaseModel):
    """The tokens of a text."""

    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeRequest(RequestModel):
    """Tokens."""

    model: str | None = None
    tokens: list[int] = Field(fail_fast=True)


class DetokenizeAnswer(BaseModel):
    """The text of tokens, special ones included."""

    prompt: str


def add_tokens(app: FastAPI, context: GatewayContext) -> None:
    """Serve the tokenizer."""
    tokenizer, threads, card = context.tokenizer, context.text_threads, context.card

    @app.post("/tokenize")
    async def tokenize(asked: TokenizeRequest) -> TokenizeAnswer:
        check_model(asked.model or card.name, card)
        size = num_characters(asked.messages, asked.chat_template_kwargs)
        text, adds_special = await threads.run(size, partial(_text, asked, context))
        encode = tokenizer.encode if adds_special else tokenizer.encode_part
        tokens = await threads.run(len(text), lambda: encode(text))
        return TokenizeAnswer(count=len(tokens), max_model_len=card.context_length, tokens=tokens)

    @app.post("/detokenize")
    async def detokenize(asked: DetokenizeRequest) -> DetokenizeAnswer:
        check_model(asked.model or card.name, card)
        wrong = next((token for token in asked.tokens if not 0 <= token < card.vocab_size), None)
        if wrong is not None:
            raise invalid("tokens", f"{wrong} is not in 0..{card.vocab_size - 1}")
        decode = threads.run(
            len(asked.tokens), lambda: tokenizer.decode(asked.tokens, skip_special_tokens=False)
        )
        return DetokenizeAnswer(prompt=await decode)


def _text(asked: TokenizeRequest, context: GatewayContext) -> tuple[str, bool]:
    """The text to tokenise, and whether it gets special tokens around it."""
    if asked.prompt is not None:
        return asked.prompt, asked.add_special_tokens is not False
    text = render(
        asked.messages,
        asked.tools,
        context.chat_template,
        add_generation_prompt=asked.add_generation_prompt,
        variables=asked.chat_template_kwargs,
    )
    return text, asked.add_special_tokens is True
