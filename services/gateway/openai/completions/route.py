"""The route POST /v1/completions."""

from fastapi import FastAPI, Request, Response

from services.gateway.context import GatewayContext
from services.gateway.generation import GenerationRequest, Generations
from services.gateway.http.bodies import json_response, read_body
from services.gateway.http.streaming import stream, version_header, whole
from services.gateway.openai.answers import Heading, usage_fields
from services.gateway.openai.completions.answer import CompletionEvents, choice
from services.gateway.openai.completions.request import CompletionRequest, parse_request
from services.gateway.openai.limits import check_choices, check_model, check_stops
from services.gateway.text.tokenise import tokenise
from shared.messages.inference import Sampling


def add_completions(app: FastAPI, context: GatewayContext, generations: Generations) -> None:
    """Serve completions of texts."""
    schema = {"application/json": {"schema": CompletionRequest.model_json_schema()}}

    @app.post("/v1/completions", openapi_extra={"requestBody": {"content": schema}})
    async def complete(request: Request) -> Response:
        body = await read_body(request)
        return await _complete(request, body, context, generations)


async def _complete(
    http: Request, body: bytes, context: GatewayContext, generations: Generations
) -> Response:
    heading = Heading(
        answer_id=context.ids.new("cmpl"),
        kind="text_completion",
        created_s=int(context.clock.wall_s()),
        model=context.card.name,
    )
    with generations.admitted(traceparent=http.headers.get("traceparent", "")) as begin:
        asked = parse_request(body)
        generation = begin(await generation_request(asked, heading.answer_id, context))
    with_logprobs = asked.logprobs is not None
    if asked.stream:
        events = CompletionEvents(heading, include_usage=asked.include_usage, with_logprobs=with_logprobs)
        return await stream(http, context, generation, events)
    choices = [
        choice(index, pieces, with_logprobs=with_logprobs)
        for index, pieces in enumerate(await whole(http, context, generation))
    ]
    answer = heading.fields(generation.versions) | {
        "choices": choices,
        "usage": usage_fields(generation.usage),
    }
    return json_response(answer, headers=version_header(generation))


async def generation_request(
    asked: CompletionRequest, answer_id: str, context: GatewayContext
) -> GenerationRequest:
    """What a completion request asks of the model. Raises ApiError when it cannot be had."""
    check_model(asked.model, context.card)
    check_choices(len(asked.prompt), asked.n, context.settings)
    check_stops(asked.stop, context.settings)
    return GenerationRequest(
        answer_id=answer_id,
        prompts=await tokenise(asked.prompt, asked.max_tokens, context.tokenizer, context.card),
        sampling=_sampling(asked, context),
        num_choices=asked.n,
        stops=asked.stop,
        echo=asked.echo,
    )


def _sampling(asked: CompletionRequest, context: GatewayContext) -> Sampling:
    return Sampling(
        max_tokens=asked.max_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        seed=context.ids.seed() if asked.seed is None else asked.seed,
        stop_token_ids=context.card.eos_token_ids,
        num_logprobs=asked.logprobs,
    )
