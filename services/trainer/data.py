"""The body of a training batch as publishers send it: JSON or MessagePack, one shape."""

from typing import Annotated, Any

import msgpack
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from shared.errors import InvalidBatchError

MAX_EXAMPLES = 4096
MAX_ID_CHARACTERS = 256


class _Strict(BaseModel):
    """No coercion and no unknown keys: what was sent is what is meant."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PromptCompletion(_Strict):
    """Learn the completion, given the prompt."""

    prompt: str
    completion: str


class ChatMessage(_Strict):
    """One turn of a conversation."""

    role: str
    content: str


class Conversation(_Strict):
    """Learn what the assistant says."""

    messages: list[ChatMessage] = Field(min_length=1)


class PlainText(_Strict):
    """Learn the text."""

    text: str


class TokenIds(_Strict):
    """Learn the tokens as they are."""

    token_ids: list[int]


_KIND_BY_KEY = {
    "prompt": "completion",
    "completion": "completion",
    "messages": "messages",
    "text": "text",
    "token_ids": "token_ids",
}


def _kind(example: object) -> str | None:
    keys = example if isinstance(example, dict) else ()
    return next((kind for key, kind in _KIND_BY_KEY.items() if key in keys), None)


Example = Annotated[
    Annotated[PromptCompletion, Tag("completion")]
    | Annotated[Conversation, Tag("messages")]
    | Annotated[PlainText, Tag("text")]
    | Annotated[TokenIds, Tag("token_ids")],
    Discriminator(
        _kind,
        custom_error_type="example",
        custom_error_message="has none of the keys prompt and completion, messages, text, token_ids",
    ),
]


class BatchBody(_Strict):
    """A training batch: one optimizer step."""

    id: str | None = Field(default=None, min_length=1, max_length=MAX_ID_CHARACTERS)
    """A batch whose id was seen before is not applied again."""
    examples: list[Example] = Field(min_length=1, max_length=MAX_EXAMPLES)


def read_body(body: bytes) -> BatchBody:
    """Read a body in either format. Raises InvalidBatchError with the first fault."""
    try:
        if body.lstrip(b" \t\r\n")[:1] == b"{":
            return BatchBody.model_validate_json(body)
        return BatchBody.model_validate(_unpack_map(body))
    except ValidationError as error:
        raise InvalidBatchError(_first_fault(error)) from error


def _unpack_map(body: bytes) -> dict[str, Any]:
    """A MessagePack map begins with a byte that no JSON text begins with."""
    if not body or not (0x80 <= body[0] <= 0x8F or body[0] in (0xDE, 0xDF)):
        raise InvalidBatchError("the body is neither a JSON object nor a MessagePack map")
    try:
        content: dict[str, Any] = msgpack.unpackb(body)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise InvalidBatchError(
            f"the body is not MessagePack: {str(error) or type(error).__name__}"
        ) from error
    return content


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = list(fault["loc"])
    if place[:1] == ["examples"] and len(place) > 2:
        del place[2]  # pydantic's name for the kind of example, which is no key of the body
    where = ".".join(str(part) for part in place) or "the body"
    return f"{where}: {fault['msg']}"
