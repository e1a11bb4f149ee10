"""Types of fields whose values have bounds, checked where a message is unpacked."""

import sys
from typing import Annotated

from msgspec import Meta

_MAX = sys.float_info.max
"""Infinity is above it, and a number that is none compares with nothing."""

Count = Annotated[int, Meta(ge=0)]
PositiveInt = Annotated[int, Meta(ge=1)]
FiniteFloat = Annotated[float, Meta(ge=-_MAX, le=_MAX)]
NonNegativeFloat = Annotated[float, Meta(ge=0, le=_MAX)]
PositiveFloat = Annotated[float, Meta(gt=0, le=_MAX)]
Share = Annotated[float, Meta(ge=0, le=1)]
PositiveShare = Annotated[float, Meta(gt=0, le=1)]

GatewayId = Annotated[str, Meta(pattern=r"^[\w-]+(\.[\w-]+)?\Z")]
"""Part of a subject: the name of the NATS user that alone may hear it, a dot, and the id of its process."""
FileStem = Annotated[str, Meta(pattern=r"^[\w.-]+\Z")]
"""Part of a file's name."""
