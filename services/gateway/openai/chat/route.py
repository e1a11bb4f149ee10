"""The route POST /v1/chat/completions."""

from fastapi import FastAPI, Request, Response

from services.gateway.context import GatewayContext
from services.gateway.feedback.recording import recorded
from services.gateway.feedback.service import Feedback
from services.gateway.generation import Generations
from services.gateway.http.auth import caller_of
from services.gateway.http.bodies import json_response
from services.gateway.http.streaming import stream, version_header, whole
from services.gateway.openai.answers import documented, new_heading, usage_of
from services.gateway.openai.chat.answer import ChatCompletion, ChatEvents, choice_of, reader_of
from services.gateway.openai.chat.prompt import generation_request
from services.gateway.openai.chat.remembered import chat_recorder
from services.gateway.openai.chat.request import ChatRequest


def add_chat(app: FastAPI, context: GatewayContext, generations: Generations, feedback: Feedback) -> None:
    """Serve answers to conversations."""

    @app.post("/v1/chat/completions", responses=documented(ChatCompletion))
    async def chat(http: Request, asked: ChatRequest) -> Response:
        kind = "chat.completion.chunk" if asked.stream else "chat.completion"
        caller = caller_of(http)
        service_class = asked.service_class(caller.service_class)
        heading = new_heading(context, "chatcmpl", kind, service_class=service_class)
        with generations.admitted(caller) as begin:
            recorder = chat_recorder(
                asked,
                heading.answer_id,
                store=asked.store,
                caller=caller,
                context=context,
                feedback=feedback,
            )
            generation = begin(await generation_request(asked, heading.answer_id, service_class, context))
        readers = [reader_of(asked, context.ids) for _ in range(asked.n)]
        if asked.stream:
            events = ChatEvents(
                heading,
                readers,
                context.tokenizer,
                include_usage=asked.stream_options.include_usage,
                with_logprobs=asked.logprobs,
                usage_so_far=(lambda: generation.usage) if asked.stream_options.counts_always else None,
            )
            return await stream(http, context, generation, recorded(events, recorder))
        pieces = await whole(http, context, generation)
        if recorder is not None:
            recorder.whole(pieces, generation.versions)
        choices = [
            choice_of(index, of_choice, reader, context.tokenizer, with_logprobs=asked.logprobs)
            for index, (of_choice, reader) in enumerate(zip(pieces, readers, strict=True))
        ]
        answer = {"choices": choices, "usage": usage_of(generation.usage)}
        return json_response(
            ChatCompletion.model_validate(heading.fields(generation.versions) | answer).model_dump(
                exclude_unset=True
            ),
            headers=version_header(generation),
        )
