"""The routes of models: the one that is served."""

from fastapi import FastAPI, Response

from services.gateway.context import GatewayContext
from services.gateway.http.bodies import json_response
from services.gateway.openai.limits import check_model


def add_models(app: FastAPI, context: GatewayContext) -> None:
    """Serve the list of models, and the model."""
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
        check_model(name, context.card)
        return json_response(model)
