"""The parameters of a request for a fine-tuning job, in OpenAI's shape."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from services.gateway.jobs.job import Hyperparameters
from services.gateway.openai.schema import AS_WHOLE, RequestModel, at_most, invalid
from shared.examples import (
    DEFAULT_BETA,
    DEFAULT_MULTIPLIER,
    DEFAULT_MULTIPLIER_OF_PREFERENCES,
    MAX_BETA,
    MAX_EXAMPLES,
    MAX_LEARNING_RATE_MULTIPLIER,
)

MAX_EPOCHS = 50
MAX_METADATA = 16
MAX_SEED = 2**31 - 1
DEFAULT_EPOCHS = 3
DEFAULT_BATCH_SIZE = 8

Auto = Literal["auto"]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED), AS_WHOLE]
Epochs = Annotated[int, Field(ge=1, le=MAX_EPOCHS), AS_WHOLE]
BatchSize = Annotated[int, Field(ge=1, le=MAX_EXAMPLES), AS_WHOLE]
Beta = Annotated[float, Field(gt=0, le=MAX_BETA)]
Multiplier = Annotated[float, Field(gt=0, le=MAX_LEARNING_RATE_MULTIPLIER)]


def _auto_is_none(value: object) -> object:
    return None if value == "auto" else value


class HyperparametersAsked(RequestModel):
    """None: `auto`, which is LeMix's default."""

    default_multiplier: ClassVar[float] = DEFAULT_MULTIPLIER

    n_epochs: Annotated[
        Epochs | None, BeforeValidator(_auto_is_none, json_schema_input_type=Epochs | Auto)
    ] = None
    batch_size: Annotated[
        BatchSize | None, BeforeValidator(_auto_is_none, json_schema_input_type=BatchSize | Auto)
    ] = None
    learning_rate_multiplier: Annotated[
        Multiplier | None, BeforeValidator(_auto_is_none, json_schema_input_type=Multiplier | Auto)
    ] = None

    def chosen(self) -> Hyperparameters:
        """With LeMix's choice for what was left to it."""
        return Hyperparameters(
            n_epochs=self.n_epochs or DEFAULT_EPOCHS,
            batch_size=self.batch_size or DEFAULT_BATCH_SIZE,
            learning_rate_multiplier=self.learning_rate_multiplier or self.default_multiplier,
        )


class SupervisedAsked(RequestModel):
    """How a supervised job trains."""

    hyperparameters: HyperparametersAsked | None = None


class DpoHyperparametersAsked(HyperparametersAsked):
    """The same, for preferences."""

    default_multiplier: ClassVar[float] = DEFAULT_MULTIPLIER_OF_PREFERENCES

    beta: Annotated[Beta | None, BeforeValidator(_auto_is_none, json_schema_input_type=Beta | Auto)] = None


class DpoAsked(RequestModel):
    """How a job with preferences trains."""

    hyperparameters: DpoHyperparametersAsked | None = None


class MethodAsked(RequestModel):
    """The newer place of hyperparameters."""

    type: Literal["supervised", "dpo"]
    supervised: SupervisedAsked | None = None
    dpo: DpoAsked | None = None

    @property
    def asked(self) -> HyperparametersAsked:
        """Those of its type."""
        if self.type == "dpo":
            return (self.dpo and self.dpo.hyperparameters) or DpoHyperparametersAsked()
        return (self.supervised and self.supervised.hyperparameters) or HyperparametersAsked()


MetadataKey = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class JobRequest(RequestModel):
    """The body of POST /v1/fine_tuning/jobs."""

    model: str
    training_file: str
    hyperparameters: HyperparametersAsked | None = None
    method: MethodAsked | None = None
    seed: Seed | None = None
    metadata: Annotated[
        dict[MetadataKey, MetadataValue] | None, Field(max_length=MAX_METADATA), at_most(MAX_METADATA)
    ] = None

    # OpenAI's, accepted only where they change nothing.
    validation_file: None = None
    suffix: None = None
    integrations: Annotated[list[Any], Field(max_length=0)] = Field(default_factory=list)

    @property
    def asked(self) -> HyperparametersAsked:
        """The hyperparameters, from whichever place they were given in."""
        return self.method.asked if self.method else self.hyperparameters or HyperparametersAsked()

    @property
    def beta(self) -> float | None:
        """None: the job is supervised."""
        asked = self.asked
        return (asked.beta or DEFAULT_BETA) if isinstance(asked, DpoHyperparametersAsked) else None

    def check_method(self) -> None:
        """Raises ApiError when hyperparameters are given in two places, or for another method."""
        method = self.method
        if method is None:
            return
        if self.hyperparameters is not None:
            raise invalid("hyperparameters", "'method' is given too")
        for name, given in (("supervised", method.supervised), ("dpo", method.dpo)):
            if given is not None and name != method.type:
                raise invalid(f"method.{name}", f"the type of the method is {method.type!r}")
