"""The body of a training batch as publishers send it: JSON or MessagePack, one shape."""

from typing import Any

import msgpack
from pydantic import Field, ValidationError

from shared.errors import InvalidBatchError
from shared.examples import (
    MAX_EXAMPLES,
    MAX_LEARNING_RATE_MULTIPLIER,
    Example,
    Strict,
    first_fault,
)

MAX_ID_CHARACTERS = 256


class BatchBody(Strict):
    """A training batch: one optimizer step."""

    id: str | None = Field(default=None, min_length=1, max_length=MAX_ID_CHARACTERS)
    """A batch whose id was seen before is not applied again."""
    examples: list[Example] = Field(min_length=1, max_length=MAX_EXAMPLES)
    learning_rate_multiplier: float = Field(
        default=1.0, gt=0, le=MAX_LEARNING_RATE_MULTIPLIER, allow_inf_nan=False
    )
    """The trainer's learning rate times this is the batch's."""


def read_body(body: bytes) -> BatchBody:
    """Read a body in either format. Raises InvalidBatchError with the first fault."""
    try:
        if body.lstrip(b" \t\r\n")[:1] == b"{":
            return BatchBody.model_validate_json(body)
        return BatchBody.model_validate(_unpack_map(body))
    except ValidationError as error:
        raise InvalidBatchError(_described(error)) from error


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


def _described(error: ValidationError) -> str:
    """The kind of an example follows `examples` and its number."""
    fault = first_fault(error, kind_at=2)
    return fault if error.errors()[0]["loc"] else f"the body: {fault}"
