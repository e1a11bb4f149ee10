"""The route POST /v1/responses: a chat in other words."""

from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import FastAPI, Request, Response
from pydantic_core import to_jsonable_python

from services.gateway.access.keys import ServiceClass
from services.gateway.context import GatewayContext
from services.gateway.feedback.recording import recorded
from services.gateway.feedback.service import Feedback
from services.gateway.generation import Generations
from services.gateway.http.auth import caller_of
from services.gateway.http.bodies import json_response
from services.gateway.http.errors import ApiError
from services.gateway.http.streaming import stream, version_header, whole
from services.gateway.openai.answers import documented
from services.gateway.openai.chat.answer import reader_of, scored_tokens
from services.gateway.openai.chat.prompt import generation_request
from services.gateway.openai.chat.remembered import chat_recorder
from services.gateway.openai.objective import TIERS
from services.gateway.openai.responses.answer import ResponseEvents, ResponseObject
from services.gateway.openai.responses.request import ResponseRequest

_NAMES = {
    "messages": "input",
    "prompt": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "logprobs": "include",
}
"""Parameters of a chat, and what they are called here."""


def add_responses(
    app: FastAPI, context: GatewayContext, generations: Generations, feedback: Feedback
) -> None:
    """Serve responses; the next one knows nothing of the last."""

    @app.post("/v1/responses", responses=documented(ResponseObject))
    async def respond(http: Request, asked: ResponseRequest) -> Response:
        answer_id, chat = context.ids.new("resp"), asked.for_chat()
        caller = caller_of(http)
        service_class = asked.service_class(caller.service_class)
        with _own_names(), generations.admitted(caller) as begin:
            recorder = chat_recorder(
                chat, answer_id, store=asked.store, caller=caller, context=context, feedback=feedback
            )
            generation = begin(await generation_request(chat, answer_id, service_class, context))
        events = ResponseEvents(
            _response_of(asked, answer_id, service_class, context),
            context.ids.new,
            reader=reader_of(chat, context.ids),
            logprobs_of=lambda entries: scored_tokens(entries, context.tokenizer),
        )
        if asked.stream:
            return await stream(http, context, generation, recorded(events, recorder))
        [pieces] = await whole(http, context, generation)
        if recorder is not None:
            recorder.whole([pieces], generation.versions)
        for piece in pieces:
            events.piece(0, piece, generation.versions)
        events.ending(generation.versions, generation.usage)
        return json_response(events.response, headers=version_header(generation))


def _response_of(
    asked: ResponseRequest, answer_id: str, service_class: ServiceClass, context: GatewayContext
) -> ResponseObject:
    """The response before it has begun."""
    return ResponseObject(
        id=answer_id,
        created_at=int(context.clock.wall_s()),
        model=context.card.name,
        instructions=asked.instructions,
        max_output_tokens=asked.max_output_tokens,
        metadata=asked.metadata,
        parallel_tool_calls=asked.parallel_tool_calls,
        service_tier=TIERS[service_class],
        store=asked.store,
        temperature=asked.temperature,
        text=asked.text.model_dump(by_alias=True),
        tool_choice=to_jsonable_python(asked.tool_choice),
        tools=[tool.model_dump() for tool in asked.tools],
        top_logprobs=asked.top_logprobs,
        top_p=asked.top_p,
    )


@contextmanager
def _own_names() -> Iterator[None]:
    """Errors in the block name parameters of a chat; outside they name those of this API."""
    try:
        yield
    except ApiError as error:
        if error.param is None:
            raise
        own = _own_name(error.param)
        message = error.message.replace(repr(error.param), repr(own))
        raise ApiError(error.status, message, param=own, code=error.code) from error


def _own_name(param: str) -> str:
    first, *others = param.split(".")
    return ".".join([_NAMES.get(first, first), *(part for part in others if part != "function")])
