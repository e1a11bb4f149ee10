"""Common parts of the answers of all routes that generate."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_json

from services.gateway.access.keys import ServiceClass
from services.gateway.context import GatewayContext
from services.gateway.generation import Usage, Versions
from services.gateway.http.errors import ApiError
from services.gateway.openai.objective import TIERS, ServiceTier
from services.gateway.version_ranges import VersionRange

Json = dict[str, object]

_DONE = b"data: [DONE]\n\n"


class PromptTokensDetails(BaseModel):
    """Tokens of prompts that a node had in its KV cache, from other requests."""

    cached_tokens: int


class UsageAnswer(BaseModel):
    """OpenAI's count of tokens."""

    prompt_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens: int
    total_tokens: int


class VersionsOfTokens(BaseModel):
    """A weights version, and the tokens in a row that it made, counted from 0 within the choice."""

    version: int
    first_token: int
    last_token: int


class ChoiceDetails(BaseModel):
    """Facts about a choice that OpenAI's API has no place for."""

    versions: list[VersionsOfTokens]


class Answer(BaseModel):
    """The fields that every answer begins with."""

    id: str
    object: str
    created: int
    """Seconds since the Unix epoch."""
    model: str
    system_fingerprint: str | None
    """The weights that made the first and the last token: `weights-3-5`."""
    service_tier: ServiceTier
    """`flex`: it was served as those of the class `batch`."""
    usage: UsageAnswer


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """The fields at the top of an answer and of every event."""

    answer_id: str
    kind: str
    """OpenAI's name of the object: `text_completion`."""
    created_s: int
    """Seconds since the Unix epoch."""
    model: str
    service_class: ServiceClass

    def fields(self, versions: Versions | None) -> Json:
        """The JSON fields before the choices."""
        return {
            "id": self.answer_id,
            "object": self.kind,
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": fingerprint(versions),
            "service_tier": TIERS[self.service_class],
        }


def new_heading(context: GatewayContext, prefix: str, kind: str, *, service_class: ServiceClass) -> Heading:
    """The heading of an answer that begins now; its id begins with `prefix`."""
    return Heading(
        answer_id=context.ids.new(prefix),
        kind=kind,
        created_s=int(context.clock.wall_s()),
        model=context.card.name,
        service_class=service_class,
    )


def fingerprint(versions: Versions | None) -> str | None:
    """The weights that made the answer's first and last token; None when nothing was computed."""
    return None if versions is None else f"weights-{versions.first}-{versions.last}"


def details_of(ranges: Iterable[VersionRange]) -> Json:
    """The fields of ChoiceDetails."""
    return {"versions": [each._asdict() for each in ranges]}


def usage_of(usage: Usage) -> Json:
    """The fields of UsageAnswer."""
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
        "completion_tokens": usage.num_generated_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_generated_tokens,
    }


class ChunkEncoder:
    """Makes the events of one stream of chunks; what all of them share is encoded once."""

    def __init__(
        self, heading: Heading, *, include_usage: bool, usage_so_far: Callable[[], Usage] | None = None
    ) -> None:
        """`usage_so_far`: what each chunk tells; None: nothing."""
        self._usage_so_far = usage_so_far
        self._heading = heading
        self._include_usage = include_usage
        self._end = '}],"usage":null}\n\n' if include_usage else "}]}\n\n"
        self._versions: Versions | None = None
        self._head = self._encode_head(None)

    def opening(self, versions: Versions | None) -> bytes:
        """No event comes before the first piece."""
        return b""

    def chunk(self, index: int, choice: str, versions: Versions | None) -> bytes:
        """The event of one choice, whose JSON fields behind its index are `choice`."""
        if versions != self._versions:
            self._versions, self._head = versions, self._encode_head(versions)
        return f"{self._head}{index},{choice}{self._encode_end()}".encode()

    def ending(self, versions: Versions | None, usage: Usage) -> bytes:
        """The events after the last chunk of a complete answer."""
        if not self._include_usage:
            return _DONE
        return event(self._heading.fields(versions) | {"choices": [], "usage": usage_of(usage)}) + _DONE

    def failure(self, error: ApiError) -> bytes:
        """The event that ends a stream whose answer stays incomplete."""
        return event(error.body())

    def _encode_end(self) -> str:
        if self._usage_so_far is None:
            return self._end
        usage = to_json(usage_of(self._usage_so_far())).decode()
        return f'}}],"usage":{usage}}}\n\n'

    def _encode_head(self, versions: Versions | None) -> str:
        fields = to_json(self._heading.fields(versions)).decode()
        return f'data: {fields[:-1]},"choices":[{{"index":'


def event(content: object) -> bytes:
    """A server-sent event of a JSON value."""
    return b"data: " + to_json(content) + b"\n\n"


def documented(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """How the OpenAPI document describes an answer that is whole, or a stream of events."""
    events = {"schema": {"type": "string", "description": "server-sent events, when `stream` is true"}}
    return {200: {"model": model, "content": {"text/event-stream": events}}}
