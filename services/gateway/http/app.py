"""The HTTP routes, in OpenAI's words."""

from collections.abc import Mapping

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from services.gateway.context import GatewayContext
from services.gateway.generation import Generations
from services.gateway.health import HealthProbe
from services.gateway.http.bodies import json_response
from services.gateway.http.errors import ApiError, ClientGoneError
from services.gateway.jobs.fine_tuning import FineTuning
from services.gateway.openai.completions.route import add_completions
from services.gateway.openai.files import add_files
from services.gateway.openai.jobs import add_jobs
from services.gateway.openai.models import add_models
from shared.errors import LemixError

_CLIENT_GONE = 499
"""nginx's status for a client that left; only logs ever see it."""


def build_app(context: GatewayContext, fine_tuning: FineTuning) -> FastAPI:
    """The application that serves `context.card` through `context.cluster`, and has it trained."""
    app = FastAPI(title="LeMix")
    _add_error_handlers(app)
    add_completions(app, context, Generations(context))
    add_models(app, context)
    _add_operations(app, context)
    add_files(app, fine_tuning, context.settings)
    add_jobs(app, fine_tuning, context.settings)
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
