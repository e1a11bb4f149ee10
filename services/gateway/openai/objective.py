"""The times that a request asks for, and what its class of service makes of them."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from services.gateway.access.keys import ServiceClass
from services.gateway.openai.schema import RequestModel, Whole
from shared.messages.inference import Objective

ServiceTier = Literal["default", "flex"]
TIERS: Mapping[ServiceClass, ServiceTier] = {"interactive": "default", "batch": "flex"}
"""OpenAI's names of the classes."""

MAX_PRIORITY = 99
_FIRST_PRIORITY: Mapping[ServiceClass, int] = {"interactive": 0, "batch": MAX_PRIORITY + 1}
"""A request can step behind others of its class, never ahead of all of them."""

Seconds = Annotated[float, Field(gt=0)]


class SloParameters(RequestModel):
    """The times that an answer is to keep; those that are not given are the run's."""

    ttft_s: Seconds | None = None
    """Until the first token."""
    tbt_s: Seconds | None = None
    """Between two tokens."""
    when_late: Literal["refuse", "serve_last"] | None = None
    """Where the first token can no longer be in time."""


class LemixParameters(RequestModel):
    """Parameters that OpenAI's API has no place for."""

    slo: SloParameters = SloParameters()
    priority: Whole = Field(default=0, ge=0, le=MAX_PRIORITY)
    """Lower goes first."""


class ObjectiveParameters(RequestModel):
    """How soon an answer is needed."""

    lemix: LemixParameters = LemixParameters()
    service_tier: Literal["auto", "default", "flex"] = "auto"
    """`flex`: as a key of the class `batch`; else as the key."""

    def service_class(self, of_key: ServiceClass) -> ServiceClass:
        """The class of this request by a key of that class."""
        return "batch" if self.service_tier == "flex" else of_key

    def objective(self, service_class: ServiceClass) -> Objective:
        """The objective of this request in that class, which bounds its priority."""
        slo = self.lemix.slo
        return Objective(
            ttft_s=slo.ttft_s,
            tbt_s=slo.tbt_s,
            when_late=slo.when_late or ("serve_last" if service_class == "batch" else None),
            priority=_FIRST_PRIORITY[service_class] + self.lemix.priority,
        )
