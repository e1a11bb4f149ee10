"""The routes of those who run the gateway: whether it answers, and in numbers."""

import asyncio
from collections.abc import Awaitable
from typing import Literal, TypeVar

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from services.gateway.context import GatewayContext
from services.gateway.health import Health
from services.gateway.http.bodies import json_response
from shared.errors import LemixError

T = TypeVar("T")


class Healthy(BaseModel):
    """A token has just moved through a whole node."""

    status: Literal["ok"] = "ok"
    token_s: float
    """How long it took."""
    weights_version: int
    """The weights that made it."""


class Failing(BaseModel):
    """No token came."""

    status: Literal["failing"] = "failing"
    reason: str


class Alive(BaseModel):
    """The gateway's process answers; what stands behind it is not asked."""

    status: Literal["ok"] = "ok"


class MetricsText(Response):
    """Prometheus' text format."""

    media_type = CONTENT_TYPE_LATEST


def add_operations(app: FastAPI, context: GatewayContext) -> None:
    """Serve health and metrics."""

    @app.get("/health", response_model=Healthy, responses={503: {"model": Failing}})
    async def health() -> Healthy | Response:
        return _answer(await context.probe.check())

    @app.get("/health/ready", response_model=Healthy, responses={503: {"model": Failing}})
    async def ready() -> Healthy | Response:
        return _answer(await context.probe.check_ready())

    @app.get("/health/live", response_model=Alive)
    async def live() -> Alive:
        return Alive()

    @app.get("/metrics", response_class=MetricsText)
    async def metrics() -> MetricsText:
        cluster = context.cluster
        status, weights = await asyncio.gather(
            _or_none(cluster.cluster_status()), _or_none(cluster.weights_status())
        )
        context.metrics.show_cluster(status)
        context.metrics.show_weights(weights)
        return MetricsText(context.metrics.render())


def _answer(outcome: Health) -> Healthy | Response:
    if outcome.weights_version is None:
        return json_response(Failing(reason=outcome.reason), status=503)
    return Healthy(token_s=outcome.seconds, weights_version=outcome.weights_version)


async def _or_none(answer: Awaitable[T]) -> T | None:
    """The answer; None when there is none."""
    try:
        return await answer
    except LemixError:
        return None
