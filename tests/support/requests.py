"""Reads the body of a request as the gateway's routes do."""

from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from services.gateway.openai.schema import refusal

Model = TypeVar("Model", bound=BaseModel)


def read(model: type[Model], fields: dict[str, Any]) -> Model:
    """Raises ApiError as a route would."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        faults = [fault | {"loc": ("body", *fault["loc"])} for fault in error.errors()]
        raise refusal(RequestValidationError(faults)) from error
