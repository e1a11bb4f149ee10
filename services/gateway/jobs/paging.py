"""OpenAI's lists, page by page: `after` is the id of the last object that the client has."""

from collections.abc import Sequence
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from services.gateway.openai.schema import invalid


class Page(BaseModel):
    """Which part of a list is wanted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=100)] = 20


class Listed(BaseModel):
    """An object that lists have."""

    id: str


T = TypeVar("T", bound=Listed)


class ObjectList(BaseModel, Generic[T]):
    """One page."""

    object: Literal["list"] = "list"
    data: list[T]
    first_id: str | None
    last_id: str | None
    has_more: bool


def cut(ids: Sequence[str], page: Page) -> range:
    """Places of the page's objects in a list of these ids.

    Raises ApiError (400) when `after` is none of them.
    """
    start = 0
    if page.after is not None:
        if page.after not in ids:
            raise invalid("after", f"there is no {page.after!r} in this list")
        start = ids.index(page.after) + 1
    return range(start, min(start + page.limit, len(ids)))


def list_object(data: list[T], *, has_more: bool) -> ObjectList[T]:
    """One page of these objects."""
    return ObjectList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=has_more,
    )
