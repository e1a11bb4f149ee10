"""The route POST /v1/completions."""

from fastapi import FastAPI, Request, Response

from services.gateway.access.keys import ServiceClass
from services.gateway.context import GatewayContext
from services.gateway.feedback.recording import recorded
from services.gateway.feedback.service import Feedback
from services.gateway.generation import GenerationRequest, Generations
from services.gateway.http.auth import caller_of
from services.gateway.http.bodies import json_response
from services.gateway.http.streaming import stream, version_header, whole
from services.gateway.openai.answers import documented, new_heading, usage_of
from services.gateway.openai.completions.answer import Completion, CompletionEvents, choice_of
from services.gateway.openai.completions.remembered import completion_recorder
from services.gateway.openai.completions.request import CompletionRequest
from services.gateway.openai.parameters import check_parameters, sampling_of
from services.gateway.text.tokenise import tokenise


def add_completions(
    app: FastAPI, context: GatewayContext, generations: Generations, feedback: Feedback
) -> None:
    """Serve completions of texts."""

    @app.post("/v1/completions", responses=documented(Completion))
    async def complete(http: Request, asked: CompletionRequest) -> Response:
        caller = caller_of(http)
        service_class = asked.service_class(caller.service_class)
        heading = new_heading(context, "cmpl", "text_completion", service_class=service_class)
        with generations.admitted(caller) as begin:
            recorder = completion_recorder(
                asked, heading.answer_id, caller=caller, context=context, feedback=feedback
            )
            generation = begin(await generation_request(asked, heading.answer_id, service_class, context))
        with_logprobs = asked.logprobs is not None
        if asked.stream:
            events = CompletionEvents(
                heading,
                context.tokenizer,
                include_usage=asked.stream_options.include_usage,
                with_logprobs=with_logprobs,
                usage_so_far=(lambda: generation.usage) if asked.stream_options.counts_always else None,
            )
            return await stream(http, context, generation, recorded(events, recorder))
        pieces = await whole(http, context, generation)
        if recorder is not None:
            recorder.whole(pieces, generation.versions)
        choices = [
            choice_of(index, of_choice, context.tokenizer, with_logprobs=with_logprobs)
            for index, of_choice in enumerate(pieces)
        ]
        answer = {"choices": choices, "usage": usage_of(generation.usage)}
        return json_response(
            Completion.model_validate(heading.fields(generation.versions) | answer),
            headers=version_header(generation),
        )


async def generation_request(
    asked: CompletionRequest, answer_id: str, service_class: ServiceClass, context: GatewayContext
) -> GenerationRequest:
    """From a completion request to a generation. Raises ApiError when it cannot be honoured."""
    check_parameters(asked, context, num_prompts=len(asked.prompt))
    asked.check_best_of()
    sampling = sampling_of(asked, context, max_tokens=asked.num_tokens, num_logprobs=asked.logprobs)
    return GenerationRequest(
        answer_id=answer_id,
        service_class=service_class,
        objective=asked.objective(service_class),
        prompts=await tokenise(asked.prompt, asked.num_tokens, context),
        sampling=sampling,
        num_choices=asked.n,
        stops=tuple(asked.stop),
        echo=asked.echo,
    )
