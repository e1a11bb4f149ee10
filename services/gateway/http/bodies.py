"""Bodies of HTTP: read within a bound, and written as JSON."""

from collections.abc import AsyncGenerator, Mapping

from fastapi import Request, Response
from pydantic_core import to_json
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from services.gateway.http.errors import ApiError, ClientGoneError


def is_upload(headers: Headers) -> bool:
    """Whether the body is a form with files."""
    return _media_type(headers) == "multipart/form-data"


def is_json(headers: Headers) -> bool:
    """Whether the body says that it is JSON; a page of another site cannot send one without being asked."""
    media_type = _media_type(headers)
    return media_type == "application/json" or media_type.endswith("+json")


def _media_type(headers: Headers) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


async def bounded_stream(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """The body's parts as they come.

    Raises ApiError (413) as soon as the body is known to be too large, ClientGoneError when it ends early.
    """
    too_large = ApiError(413, f"the body is larger than {max_bytes} bytes")
    if int(request.headers.get("content-length", 0)) > max_bytes:
        raise too_large
    num_bytes = 0
    try:
        async for part in request.stream():
            num_bytes += len(part)
            if num_bytes > max_bytes:
                raise too_large
            yield part
    except ClientDisconnect as error:
        raise ClientGoneError("the client closed its connection") from error


def json_response(
    content: object, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """An answer in JSON."""
    return Response(to_json(content), status, headers, media_type="application/json")


def error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    """An answer that is an error."""
    return json_response(error.body(), status=error.status, headers=error.headers | dict(headers or {}))
