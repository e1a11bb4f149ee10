"""From a chat request to what the model is asked."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from services.gateway.access.keys import ServiceClass
from services.gateway.context import GatewayContext
from services.gateway.generation import GenerationRequest
from services.gateway.http.errors import ApiError
from services.gateway.openai.chat.messages import Message, for_template
from services.gateway.openai.chat.request import ChatRequest
from services.gateway.openai.chat.tools import Tool, call_schema, check_tools, strict_calls_grammar
from services.gateway.openai.parameters import check_parameters, sampling_of
from services.gateway.openai.schema import invalid
from services.gateway.text.tokenise import tokenise_rendered
from shared.chat_template import ChatTemplate
from shared.errors import ChatTemplateError, UnsupportedSchemaError
from shared.structured_output import check_grammar, grammar_of

MAX_TOKENS_BY_DEFAULT = 1024
"""Most tokens of an answer whose request names no limit, if its context has room for so many.

The scheduler keeps room for all of them in the KV cache (16,384 tokens of a node by default).
"""
MESSAGE_CHARACTERS = 64
"""A message costs as much to render as so many characters of its text."""
VARIABLES_CHARACTERS = 1_000
"""Variables of the template cost as much to render as so many characters of text."""
GRAMMAR_CHARACTERS = 10_000
"""A grammar costs as much to check as so many characters to tokenise."""


async def generation_request(
    asked: ChatRequest, answer_id: str, service_class: ServiceClass, context: GatewayContext
) -> GenerationRequest:
    """From a chat request to a generation. Raises ApiError when it cannot be honoured."""
    check_parameters(asked, context)
    check_tools(asked.tools, asked.tool_choice)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise invalid("top_logprobs", "only with 'logprobs'")
    wanted = asked.token_limit
    text, grammar = await context.text_threads.run(
        num_characters(asked.messages, asked.chat_template_kwargs)
        + (GRAMMAR_CHARACTERS if asked.may_need_grammar else 0),
        partial(_read, asked, context.chat_template),
    )
    prompt = await tokenise_rendered(text, wanted or 1, context)
    room = context.card.context_length - len(prompt.ids)
    return GenerationRequest(
        answer_id=answer_id,
        service_class=service_class,
        objective=asked.objective(service_class),
        prompts=(prompt,),
        sampling=sampling_of(
            asked,
            context,
            max_tokens=wanted or min(room, MAX_TOKENS_BY_DEFAULT),
            num_logprobs=asked.num_logprobs,
            grammar=grammar,
        ),
        num_choices=asked.n,
        stops=tuple(asked.stop),
    )


def num_characters(messages: Sequence[Message], variables: Mapping[str, Any]) -> int:
    """How much there is to render, roughly: a message costs more than its text."""
    characters = sum(MESSAGE_CHARACTERS + len(message.content or "") for message in messages)
    return characters + (VARIABLES_CHARACTERS if variables else 0)


def _read(asked: ChatRequest, template: ChatTemplate | None) -> tuple[str, str | None]:
    """The conversation as text, and the grammar of the answer. Raises ApiError."""
    tools = asked.tools if asked.may_call_tools else []
    text = render(asked.messages, tools, template, variables=asked.chat_template_kwargs)
    return text, _grammar_of(asked, template)


def render(
    messages: Sequence[Message],
    tools: Sequence[Tool],
    template: ChatTemplate | None,
    *,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any],
) -> str:
    """A conversation as the model reads it. Raises ApiError when the template cannot say it."""
    if template is None:
        message = "the model has no chat template; LEMIX_CHAT_TEMPLATE=FILE gives it one"
        raise ApiError(400, message, param="messages", code="no_chat_template")
    try:
        return template.render(
            [for_template(message) for message in messages],
            tools=[tool.model_dump(exclude_unset=True) for tool in tools] or None,
            add_generation_prompt=add_generation_prompt,
            variables=variables,
        )
    except ChatTemplateError as error:
        raise invalid("messages", str(error)) from error


def _grammar_of(asked: ChatRequest, template: ChatTemplate | None) -> str | None:
    """The grammar that the text is held to, or None. Raises ApiError when that cannot be done."""
    schema = asked.response_format.schema_text
    if schema is not None and asked.may_call_tools:
        raise invalid("response_format", "JSON and calls of 'tools' exclude each other")
    param = "response_format" if schema is not None else "tools"
    if schema is None and asked.may_call_tools:
        schema = call_schema(asked.tools, asked.tool_choice)
    try:
        grammar = _strict_calls(asked, template) if schema is None else grammar_of(schema)
        if grammar is not None:
            _check_end(asked)
            check_grammar(grammar)
    except UnsupportedSchemaError as error:
        raise invalid(param, str(error)) from error
    return grammar


def _check_end(asked: ChatRequest) -> None:
    """Raises ApiError for a parameter that moves the end of a text, which a grammar decides."""
    for name in ("ignore_eos", "min_tokens", "stop_token_ids"):
        if getattr(asked, name):
            raise invalid(name, "not together with JSON of a schema or with strict tools")


def _strict_calls(asked: ChatRequest, template: ChatTemplate | None) -> str | None:
    if template is None or not asked.may_call_tools:
        return None
    return strict_calls_grammar(asked.tools, template.source(with_tools=True))
