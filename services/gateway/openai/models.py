"""The routes of models: the one that is served."""

from typing import Literal

from fastapi import FastAPI
from pydantic import BaseModel

from services.gateway.context import GatewayContext
from services.gateway.http.errors import ApiError
from shared.model_files import ModelCard


class Model(BaseModel):
    """A model, as clients see it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    """When the gateway started: seconds since the Unix epoch."""
    owned_by: str = "lemix"
    max_model_len: int
    """Tokens that a prompt and its answer may have together."""


class ModelList(BaseModel):
    """All models that are served."""

    object: Literal["list"] = "list"
    data: list[Model]


def add_models(app: FastAPI, context: GatewayContext) -> None:
    """Serve the list of models, and the model."""
    card = context.card
    model = Model(id=card.name, created=int(context.clock.wall_s()), max_model_len=card.context_length)

    @app.get("/v1/models")
    async def list_models() -> ModelList:
        return ModelList(data=[model])

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> Model:
        check_model(name, card)
        return model


def check_model(name: str, card: ModelCard) -> None:
    """Raises ApiError (404) when another model is asked for than the one that is served."""
    if name != card.name:
        raise ApiError(404, f"the model {name!r} does not exist", param="model", code="model_not_found")
