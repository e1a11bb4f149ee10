"""The HTTP routes, in OpenAI's words."""

from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match, Route

from services.gateway.access.key_file import KeyRing
from services.gateway.context import GatewayContext
from services.gateway.feedback.service import Feedback
from services.gateway.generation import Generations
from services.gateway.http.auth import Gate, caller_of
from services.gateway.http.bodies import error_response
from services.gateway.http.body_reader import BodyReader
from services.gateway.http.documentation import DocumentedApp, add_documentation
from services.gateway.http.errors import ApiError, ErrorAnswer
from services.gateway.http.operations import add_operations
from services.gateway.http.paths import LenientPaths
from services.gateway.http.request_log import RequestLog
from services.gateway.jobs.fine_tuning import FineTuning
from services.gateway.openai.chat.route import add_chat
from services.gateway.openai.completions.route import add_completions
from services.gateway.openai.feedback import add_feedback
from services.gateway.openai.files import add_files
from services.gateway.openai.jobs import add_jobs
from services.gateway.openai.models import add_models
from services.gateway.openai.responses.route import add_responses
from services.gateway.openai.schema import JsonRoute, refusal
from services.gateway.openai.tokens import add_tokens

_ERRORS: dict[int | str, dict[str, object]] = {
    "4XX": {"model": ErrorAnswer, "description": "The request is refused; the error says why."},
    "5XX": {"model": ErrorAnswer, "description": "The request failed; the error says why."},
}


def _version() -> str:
    """The installed package's; its sources may also run as they are."""
    try:
        return version("lemix")
    except PackageNotFoundError:
        return "unknown"


def build_app(context: GatewayContext, fine_tuning: FineTuning, feedback: Feedback) -> FastAPI:
    """The application that serves `context.card` through `context.cluster`, and has it trained."""
    app = DocumentedApp(
        title="LeMix",
        version=_version(),
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        responses=_ERRORS,
    )
    app.router.route_class = JsonRoute
    app.add_exception_handler(HTTPException, _unknown_route)
    _add_refusals(app, context)
    _add_middlewares(app, context)
    generations = Generations(context)
    add_completions(app, context, generations, feedback)
    add_chat(app, context, generations, feedback)
    add_responses(app, context, generations, feedback)
    add_models(app, context)
    add_tokens(app, context)
    add_operations(app, context)
    add_documentation(app)
    add_files(app, fine_tuning, context.settings)
    add_jobs(app, fine_tuning)
    add_feedback(app, feedback)
    return app


def _add_middlewares(app: FastAPI, context: GatewayContext) -> None:
    """From the inside to the outside."""
    settings = context.settings
    app.add_middleware(BodyReader, settings=settings, metrics=context.metrics)
    app.add_middleware(
        Gate,
        settings=settings,
        ring=KeyRing(settings.keys_path, context.clock),
        clock=context.clock,
        metrics=context.metrics,
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
    async def refuse(request: Request, error: RequestValidationError) -> Response:
        context.metrics.refused("invalid", caller_of(request).service_class)
        return error_response(refusal(error))


def _unknown_route(request: Request, error: Exception) -> Response:
    """Starlette's own refusals (404, 405), in OpenAI's words."""
    assert isinstance(error, HTTPException)
    what = {404: "unknown URL", 405: "method not allowed"}.get(error.status_code, error.detail)
    refused = ApiError(error.status_code, f"{what}: {request.method} {request.url.path}")
    if error.status_code != 405:
        return error_response(refused, error.headers)
    return error_response(refused, {"allow": ", ".join(sorted(_methods_of(request)))})


def _methods_of(request: Request) -> set[str]:
    """The methods of the path: several routes may share it, and Starlette tells those of the first."""
    routes = (route for route in request.app.routes if isinstance(route, Route))
    return {
        method
        for route in routes
        if route.matches(request.scope)[0] is not Match.NONE
        for method in route.methods or ()
    }
