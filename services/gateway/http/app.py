"""The HTTP routes, in OpenAI's words."""

from collections.abc import Mapping

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from services.gateway.context import GatewayContext
from services.gateway.health import HealthProbe
from services.gateway.http.bodies import json_response, read_body
from services.gateway.http.errors import ApiError, ClientGoneError
from services.gateway.http.streaming import EventStream, watch
from services.gateway.jobs.fine_tuning import FineTuning
from services.gateway.openai import answers
from services.gateway.openai.completions import Completion, Completions
from services.gateway.openai.files import add_files
from services.gateway.openai.jobs import add_jobs
from services.gateway.openai.requests import CompletionRequest
from services.gateway.text.detokenise import Piece
from shared.errors import LemixError

_CLIENT_GONE = 499
"""nginx's status for a client that left; only logs ever see it."""


def build_app(context: GatewayContext, fine_tuning: FineTuning) -> FastAPI:
    """The application that serves `context.card` through `context.cluster`, and has it trained."""
    app = FastAPI(title="LeMix")
    _add_error_handlers(app)
    _add_completions(app, context)
    _add_models(app, context)
    _add_operations(app, context)
    add_files(app, fine_tuning, context.settings)
    add_jobs(app, fine_tuning, context.settings)
    return app


def _add_completions(app: FastAPI, context: GatewayContext) -> None:
    completions = Completions(context)
    schema = {"application/json": {"schema": CompletionRequest.model_json_schema()}}

    @app.post("/v1/completions", openapi_extra={"requestBody": {"content": schema}})
    async def complete(request: Request) -> Response:
        body = await read_body(request, context.settings.max_body_bytes)
        completion = await completions.begin(body, traceparent=request.headers.get("traceparent", ""))
        return await _answer(request, completion, context)


async def _answer(request: Request, completion: Completion, context: GatewayContext) -> Response:
    """The whole answer, or a stream once the nodes have taken it: until then errors have a status."""
    watcher = context.cluster.spawn(watch(request.receive, completion))
    streaming = False
    try:
        if not completion.request.stream:
            whole = await _whole(completion)
            return json_response(whole, headers=_version_header(completion))
        first = await completion.first()
        streaming = True
        return EventStream(completion, first, watcher=watcher, settings=context.settings)
    finally:
        if not streaming:
            completion.close()
            watcher.cancel()


async def _whole(completion: Completion) -> answers.Json:
    request = completion.request
    pieces: list[list[Piece]] = [[] for _ in range(len(request.prompt) * request.n)]
    while not completion.finished:
        for index, piece in await completion.next():
            pieces[index].append(piece)
    choices = [
        answers.choice(index, of_choice, with_logprobs=request.logprobs is not None)
        for index, of_choice in enumerate(pieces)
    ]
    return completion.heading.fields(completion.versions) | {"choices": choices, "usage": completion.usage}


def _version_header(completion: Completion) -> dict[str, str]:
    assert completion.versions is not None, "a whole answer has been computed"
    first, last = completion.versions
    return {answers.VERSION_HEADER: f"{first}-{last}"}


def _add_models(app: FastAPI, context: GatewayContext) -> None:
    model = {
        "id": context.card.name,
        "object": "model",
        "created": int(context.clock.wall_s()),
        "owned_by": "lemix",
    }

    @app.get("/v1/models")
    async def list_models() -> Response:
        return json_response({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> Response:
        if name != context.card.name:
            raise ApiError(404, f"the model {name!r} does not exist", param="model", code="model_not_found")
        return json_response(model)


def _add_operations(app: FastAPI, context: GatewayContext) -> None:
    card, settings = context.card, context.settings
    token = next((token for token in (card.bos_token_id, *card.eos_token_ids) if token is not None), 0)
    probe = HealthProbe(context.cluster, context.clock, token=token, timeout_s=settings.health_timeout_s)

    @app.get("/health")
    async def health() -> Response:
        outcome = await probe.check()
        if outcome.reason:
            return json_response({"status": "failing", "reason": outcome.reason}, status=503)
        return json_response(
            {"status": "ok", "token_s": outcome.seconds, "weights_version": outcome.weights_version}
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        try:
            context.metrics.show_cluster(await context.cluster.cluster_status())
        except LemixError:
            context.metrics.show_cluster(None)
        return Response(context.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> Response:
        return _refusal(error)

    @app.exception_handler(ClientGoneError)
    async def leave(_: Request, error: ClientGoneError) -> Response:
        return Response(status_code=_CLIENT_GONE)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        what = {404: "unknown URL", 405: "method not allowed"}.get(error.status_code, error.detail)
        message = f"{what}: {request.method} {request.url.path}"
        return _refusal(ApiError(error.status_code, message), error.headers)

    @app.exception_handler(Exception)
    async def fail(_: Request, error: Exception) -> Response:
        return _refusal(ApiError(500, "the gateway failed; its log says why"))


def _refusal(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    return json_response(error.body(), status=error.status, headers=error.headers | dict(headers or {}))
