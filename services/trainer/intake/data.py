"""The body of a training batch as publishers send it: JSON or MessagePack, one shape."""

from codecs import BOM_UTF8
from typing import Annotated, Any, Self

import msgspec
from pydantic import Field, StringConstraints, ValidationError, model_validator
from pydantic_core import from_json

from shared.errors import InvalidBatchError
from shared.examples import (
    DEFAULT_BETA,
    DEFAULT_MULTIPLIER,
    DEFAULT_MULTIPLIER_OF_PREFERENCES,
    MAX_BETA,
    MAX_EXAMPLES,
    MAX_LEARNING_RATE_MULTIPLIER,
    AnyExample,
    Preference,
    Strict,
    first_fault,
)
from shared.messages.lineage import MAX_NAME_CHARACTERS, MAX_SOURCES

MAX_ID_CHARACTERS = 256
OWN_ID_PREFIX = "seq-"
"""Prefix of the ids that batches without one are given."""


Name = Annotated[str, StringConstraints(max_length=MAX_NAME_CHARACTERS)]


class Source(Strict):
    """Where an example comes from, for the lineage of what learns it."""

    id: Name
    producer: Name = ""
    """Who has written it; empty: not told."""
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
    """Digest of the example, in hex."""


class BatchBody(Strict):
    """A training batch: one optimizer step."""

    id: str | None = Field(default=None, min_length=1, max_length=MAX_ID_CHARACTERS)
    """A batch whose id was seen before is not applied again."""
    examples: list[AnyExample] = Field(min_length=1, max_length=MAX_EXAMPLES)
    """Either all of them are preferences, or none is."""
    learning_rate_multiplier: float | None = Field(
        default=None, gt=0, le=MAX_LEARNING_RATE_MULTIPLIER, allow_inf_nan=False
    )
    """The trainer's learning rate times this is the batch's; None: the default of its kind."""
    beta: float | None = Field(default=None, gt=0, le=MAX_BETA, allow_inf_nan=False)
    """For preferences: how closely the weights are held to the model as it was given; None: DEFAULT_BETA."""
    producer: Name = ""
    """Who publishes it; empty: not told."""
    sources: list[Source] = Field(default_factory=list, max_length=MAX_SOURCES)
    """One for each of the examples, in their order; empty: not told."""

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> Self:
        kinds = [isinstance(example, Preference) for example in self.examples]
        if len(set(kinds)) > 1:
            other = kinds.index(not kinds[0])
            raise ValueError(
                f"of examples.0 and examples.{other} one is a preference: publish them as two batches"
            )
        if self.beta is not None and not kinds[0]:
            raise ValueError("beta is for preferences, and these examples are none")
        return self

    @model_validator(mode="after")
    def _names_each_source(self) -> Self:
        if self.sources and len(self.sources) != len(self.examples):
            raise ValueError(f"sources: {len(self.sources)} for {len(self.examples)} examples")
        return self

    @property
    def holds_preferences(self) -> bool:
        return isinstance(self.examples[0], Preference)

    @property
    def beta_of_preferences(self) -> float | None:
        """None where the examples are none."""
        return (self.beta or DEFAULT_BETA) if self.holds_preferences else None

    @property
    def chosen_multiplier(self) -> float:
        """The factor of the trainer's learning rate."""
        default = DEFAULT_MULTIPLIER_OF_PREFERENCES if self.holds_preferences else DEFAULT_MULTIPLIER
        return self.learning_rate_multiplier or default


def check_id(batch_id: str) -> None:
    """Check an id. Raises InvalidBatchError for one that no publisher may give."""
    if batch_id.startswith(OWN_ID_PREFIX):
        raise InvalidBatchError(f"id: ids that begin with {OWN_ID_PREFIX!r} are kept for batches without one")


def read_body(body: bytes) -> BatchBody:
    """Read a body in either format. Raises InvalidBatchError with the first fault."""
    body = body.removeprefix(BOM_UTF8)
    try:
        if _is_json_object(body):
            return BatchBody.model_validate_json(body)
        return BatchBody.model_validate(_unpack_map(body))
    except ValidationError as error:
        raise InvalidBatchError(_described(error)) from error


def id_in(body: bytes) -> str:
    """The id of a batch that is wrong elsewhere; empty where none can be read."""
    body = body.removeprefix(BOM_UTF8)
    try:
        content = from_json(body) if _is_json_object(body) else _unpack_map(body)
    except (ValueError, InvalidBatchError):
        return ""
    batch_id = content.get("id")
    return batch_id if isinstance(batch_id, str) and len(batch_id) <= MAX_ID_CHARACTERS else ""


def _is_json_object(body: bytes) -> bool:
    return body.lstrip(b" \t\r\n")[:1] == b"{"


def _unpack_map(body: bytes) -> dict[str, Any]:
    """Unpack a MessagePack map; it begins with a byte that no JSON text begins with."""
    if not body or not (0x80 <= body[0] <= 0x8F or body[0] in (0xDE, 0xDF)):
        raise InvalidBatchError("the body is neither a JSON object nor a MessagePack map")
    try:
        return msgspec.msgpack.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidBatchError(f"the body is not MessagePack: {error}") from error


def _described(error: ValidationError) -> str:
    """Describe a fault. The kind of an example follows `examples` and its number."""
    place = error.errors()[0]["loc"]
    fault = first_fault(error, kind_at=2 if place[:1] == ("examples",) else None)
    return fault if place else f"the body: {fault}"
