"""Bodies of HTTP: read within a bound, and written as JSON."""

from collections.abc import AsyncGenerator, Mapping

from fastapi import Request, Response
from pydantic_core import to_json
from starlette.requests import ClientDisconnect

from services.gateway.http.errors import ApiError, ClientGoneError


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


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body. Raises what `bounded_stream` raises."""
    return b"".join([part async for part in bounded_stream(request, max_bytes)])


def json_response(
    content: object, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """An answer in JSON."""
    return Response(to_json(content), status, headers, media_type="application/json")
