"""The base of every message: a frozen model that travels as a MessagePack map."""

from typing import Self

import msgpack
from pydantic import BaseModel, ConfigDict, ValidationError

from shared.errors import MalformedMessageError


class Message(BaseModel):
    """Base of all messages between services."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def pack(self) -> bytes:
        """The body as it goes over the wire."""
        packed: bytes = msgpack.packb(self, default=vars)  # half the time of model_dump()
        return packed

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """Read a body. Raises MalformedMessageError, naming this type and the first fault."""
        try:
            return cls.model_validate(msgpack.unpackb(body))
        except ValidationError as error:
            fault = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in fault["loc"])
            raise MalformedMessageError(f"{cls.__name__}: {where}: {fault['msg']}") from error
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise MalformedMessageError(f"{cls.__name__}: not MessagePack: {error}") from error


class Done(Message):
    """The empty answer to a request that is only a command."""
