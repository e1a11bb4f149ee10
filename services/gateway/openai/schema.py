"""How the bodies of OpenAI's API are read, and how a mistake in one is told."""

from collections.abc import Callable, Coroutine, Mapping, Sequence
from json import JSONDecodeError
from typing import Annotated, Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError, from_json

from services.gateway.http.bodies import is_upload
from services.gateway.http.errors import ApiError

_NULL = {"type": "null"}


def _allow_null(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """Say in a model's JSON schema that null stands for a parameter that is not given."""
    properties = schema.get("properties", {})
    for name, described in properties.items():
        if name in schema.get("required", ()) or _is_null_allowed(described):
            continue
        default = {"default": described.pop("default")} if "default" in described else {}
        properties[name] = {"anyOf": [described, _NULL], **default}


def _is_null_allowed(described: Mapping[str, Any]) -> bool:
    return described.get("type") == "null" or _NULL in described.get("anyOf", ())


class RequestModel(BaseModel):
    """A part of a request: no coercion and no unknown parameters; null is the same as not given.

    One fault is enough to refuse a request. To find all of them could take a minute, during which no stream
    would go on: lists stop at the first one (`fail_fast`), and only one unknown parameter is looked at.
    """

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, json_schema_extra=_allow_null
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, content: object) -> object:
        if not isinstance(content, dict):
            return content
        fields = {field.alias or name: field for name, field in cls.model_fields.items()}
        known = {
            name: content[name]
            for name, field in fields.items()
            if name in content and (content[name] is not None or field.is_required())
        }
        unknown = next((name for name in content if name not in fields), None)
        return known if unknown is None else known | {unknown: content[unknown]}


def at_most(num_items: int) -> BeforeValidator:
    """Counts the items of an object before it looks at any of them. Raises PydanticCustomError."""

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > num_items:
            raise PydanticCustomError("too_long", "at most {num} items are allowed", {"num": num_items})
        return value

    return BeforeValidator(check)


def _as_whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


AS_WHOLE = BeforeValidator(_as_whole)
Whole = Annotated[int, AS_WHOLE]
"""A whole number, also when it is written as `16.0`."""


class JsonRoute(APIRoute):
    """A route whose body, if it has one, is JSON without NaN and infinities.

    Raises ApiError (415) for an upload.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            if self.body_field is not None and is_upload(request.headers):
                raise ApiError(415, "expected a body of type application/json")
            return await handle(_JsonRequest(request.scope, request.receive))

        return handle_json


class _JsonRequest(Request):
    async def json(self) -> Any:
        """Raises JSONDecodeError, which FastAPI expects."""
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise JSONDecodeError(str(error), "", 0) from error


def refusal(error: RequestValidationError) -> ApiError:
    """The answer to a request that breaks its model: the first fault, and the parameter's name."""
    fault: Mapping[str, Any] = error.errors()[0]
    kind, param = fault["type"], _param(fault["loc"])
    if kind == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {fault['ctx']['error']}")
    if not param:
        return ApiError(400, "the body must be a JSON object")
    if kind == "extra_forbidden":
        return unsupported(param)
    if kind == "missing":
        return ApiError(
            400, f"parameter {param!r} is required", param=param, code="missing_required_parameter"
        )
    return invalid(param, fault["msg"])


def _param(place: Sequence[str | int]) -> str:
    """`messages.0.content` for body, messages, 0, [user], content: no client wrote what is in brackets."""
    return ".".join(str(part) for part in place[1:] if not str(part).startswith("["))


def unsupported(param: str) -> ApiError:
    """The error to raise for a parameter that is not supported."""
    return ApiError(400, f"parameter {param!r} is not supported", param=param, code="unsupported_parameter")


def invalid(param: str, reason: str) -> ApiError:
    """The error to raise for a parameter with a wrong value."""
    return ApiError(400, f"parameter {param!r}: {reason}", param=param, code="invalid_value")
