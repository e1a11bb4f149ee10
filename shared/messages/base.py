"""The base of every message: a frozen structure that travels as a MessagePack map."""

from functools import cache
from typing import Any, Self, TypeVar, dataclass_transform

import msgspec

from shared.errors import MalformedMessageError

_ENCODER = msgspec.msgpack.Encoder()


class _KeywordsOnly(msgspec.StructMeta):
    """Says `kw_only` for each message, because a structure does not inherit it."""

    def __new__(
        cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **config: Any
    ) -> "_KeywordsOnly":
        return super().__new__(cls, name, bases, namespace, kw_only=True, **config)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(msgspec.field,))
class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False, metaclass=_KeywordsOnly):
    """Base of all messages between services.

    The garbage collector does not look at messages: nothing in one can lead back to it.

    Types and bounds of fields are checked where a message is unpacked, `__post_init__` also where one is
    made: what a service makes itself, mypy has checked.
    """

    def pack(self) -> bytes:
        """The body as it goes over the wire: a map of all fields, in their order."""
        return _ENCODER.encode(self)

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """Read a body. Raises MalformedMessageError, naming this type and the first fault."""
        try:
            message: Self = _decoder(cls).decode(body)
        except msgspec.ValidationError as error:
            raise MalformedMessageError(f"{cls.__name__}: {error}") from error
        except (msgspec.DecodeError, RecursionError) as error:
            raise MalformedMessageError(f"{cls.__name__}: not MessagePack: {error}") from error
        return message


M = TypeVar("M", bound=Message)


@cache
def _decoder(kind: type[M]) -> msgspec.msgpack.Decoder[M]:
    return msgspec.msgpack.Decoder(kind)


class Event(Message, tag_field="kind"):
    """Base of messages of which several types travel in one place: the field `kind` names the type."""


class Done(Message):
    """The empty answer to a request that is only a command."""
