"""OpenAI's lists, page by page: `after` is the id of the last object that the client has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.gateway.http.errors import ApiError
from services.gateway.openai.answers import Json
from services.gateway.openai.schema import unsupported


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list is wanted."""

    after: str | None
    limit: int


def read_page(query: Mapping[str, str], *, default_limit: int, max_limit: int) -> Page:
    """The page that a query asks for. Raises ApiError (400) when `limit` is not from 1 to `max_limit`."""
    text = query.get("limit", str(default_limit))
    limit = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
    if not 1 <= limit <= max_limit:
        message = f"parameter 'limit': expected an integer from 1 to {max_limit}, got {text!r}"
        raise ApiError(400, message, param="limit", code="invalid_value")
    return Page(query.get("after"), limit)


def check_query(query: Mapping[str, str], known: Sequence[str]) -> None:
    """Raises ApiError (400) naming a parameter that is not one of `known`."""
    for name in query:
        if name not in known:
            raise unsupported(name)


def cut(ids: Sequence[str], page: Page) -> range:
    """Places of the page's objects in a list of these ids.

    Raises ApiError (400) when `after` is none of them.
    """
    start = 0
    if page.after is not None:
        if page.after not in ids:
            message = f"parameter 'after': there is no {page.after!r} in this list"
            raise ApiError(400, message, param="after", code="invalid_value")
        start = ids.index(page.after) + 1
    return range(start, min(start + page.limit, len(ids)))


def list_object(data: Sequence[Json], *, has_more: bool) -> Json:
    """One page."""
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }
