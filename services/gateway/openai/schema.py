"""How the bodies of OpenAI's API are read, and how a mistake in one is told."""

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from services.gateway.http.errors import ApiError


class Strict(BaseModel):
    """No coercion and no unknown parameters."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


def read_object(body: bytes) -> dict[str, Any]:
    """A request's body as it stands. Raises ApiError (400) when it is no JSON object."""
    try:
        content = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ApiError(400, "the body must be a JSON object")
    return content


def without_neutral(
    content: Mapping[str, Any], known: Collection[str], neutral: Mapping[str, tuple[object, ...]]
) -> dict[str, Any]:
    """Drop what changes nothing: nulls of known parameters, and those of `neutral` at rest.

    Raises ApiError (400) naming one of `neutral` that is not at rest.
    """
    kept = {}
    for name, value in content.items():
        if name in neutral:
            if isinstance(value, bool) or value not in neutral[name]:
                raise unsupported(name)
        elif value is not None or name not in known:
            kept[name] = value
    return kept


def unsupported(name: str) -> ApiError:
    """What to raise for a parameter that is not supported."""
    return ApiError(400, f"parameter {name!r} is not supported", param=name, code="unsupported_parameter")


def refusal(error: ValidationError) -> ApiError:
    """What to raise for a body that breaks its model: the first fault, and the parameter's name."""
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return unsupported(param)
    if fault["type"] == "missing":
        return ApiError(
            400, f"parameter {param!r} is required", param=param, code="missing_required_parameter"
        )
    return ApiError(400, f"parameter {param!r}: {fault['msg']}", param=param, code="invalid_value")
