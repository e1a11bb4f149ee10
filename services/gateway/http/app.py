"""The HTTP routes, in OpenAI's words."""

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from services.gateway.access.key_file import KeyRing
from services.gateway.context import GatewayContext
from services.gateway.generation import Generations
from services.gateway.health import HealthProbe
from services.gateway.http.auth import Gate
from services.gateway.http.bodies import error_response, json_response
from services.gateway.http.body_reader import BodyReader
from services.gateway.http.errors import ApiError, ErrorAnswer
from services.gateway.http.paths import LenientPaths
from services.gateway.http.request_log import RequestLog
from services.gateway.jobs.fine_tuning import FineTuning
from services.gateway.openai.chat.route import add_chat
from services.gateway.openai.completions.route import add_completions
from services.gateway.openai.files import add_files
from services.gateway.openai.jobs import add_jobs
from services.gateway.openai.models import add_models
from services.gateway.openai.responses.route import add_responses
from services.gateway.openai.schema import JsonRoute, refusal
from services.gateway.openai.tokens import add_tokens
from shared.errors import LemixError

_ERRORS: dict[int | str, dict[str, object]] = {
    "4XX": {"model": ErrorAnswer, "description": "The request is refused; the error says why."},
    "5XX": {"model": ErrorAnswer, "description": "The request failed; the error says why."},
}


def build_app(context: GatewayContext, fine_tuning: FineTuning) -> FastAPI:
    """The application that serves `context.card` through `context.cluster`, and has it trained."""
    app = FastAPI(
        title="LeMix",
        redirect_slashes=False,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        responses=_ERRORS,
    )
    app.router.route_class = JsonRoute
    app.add_exception_handler(HTTPException, _unknown_route)
    _add_refusals(app, context)
    _add_middlewares(app, context)
    generations = Generations(context)
    add_completions(app, context, generations)
    add_chat(app, context, generations)
    add_responses(app, context, generations)
    add_models(app, context)
    add_tokens(app, context)
    _add_operations(app, context)
    add_files(app, fine_tuning, context.settings)
    add_jobs(app, fine_tuning)
    return app


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


def _add_middlewares(app: FastAPI, context: GatewayContext) -> None:
    """From the inside to the outside."""
    settings = context.settings
    app.add_middleware(BodyReader, settings=settings, metrics=context.metrics)
    app.add_middleware(
        Gate, settings=settings, ring=KeyRing(settings.keys_path, context.clock), clock=context.clock
    )
    app.add_middleware(LenientPaths, prefix=settings.root_path)
    app.add_middleware(RequestLog, ids=context.ids, telemetry=context.telemetry)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
        )


def _add_refusals(app: FastAPI, context: GatewayContext) -> None:
    """FastAPI's refusals of what a request says, in OpenAI's words."""

    @app.exception_handler(RequestValidationError)
    async def refuse(_: Request, error: RequestValidationError) -> Response:
        context.metrics.requests.labels("refused").inc()
        return error_response(refusal(error))


def _unknown_route(request: Request, error: Exception) -> Response:
    """Starlette's own refusals (404, 405), in OpenAI's words."""
    assert isinstance(error, HTTPException)
    what = {404: "unknown URL", 405: "method not allowed"}.get(error.status_code, error.detail)
    message = f"{what}: {request.method} {request.url.path}"
    return error_response(ApiError(error.status_code, message), error.headers)
