"""The parameters of a request for a fine-tuning job, in OpenAI's shape."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from services.gateway.jobs.job import Hyperparameters
from services.gateway.openai.schema import AS_WHOLE, RequestModel, at_most, invalid
from shared.examples import MAX_EXAMPLES, MAX_LEARNING_RATE_MULTIPLIER

MAX_EPOCHS = 50
MAX_METADATA = 16
MAX_SEED = 2**31 - 1
DEFAULT_EPOCHS = 3
DEFAULT_BATCH_SIZE = 8
DEFAULT_LEARNING_RATE_MULTIPLIER = 1.0

Auto = Literal["auto"]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED), AS_WHOLE]
Epochs = Annotated[int, Field(ge=1, le=MAX_EPOCHS), AS_WHOLE]
BatchSize = Annotated[int, Field(ge=1, le=MAX_EXAMPLES), AS_WHOLE]
Multiplier = Annotated[float, Field(gt=0, le=MAX_LEARNING_RATE_MULTIPLIER)]


def _auto_is_none(value: object) -> object:
    return None if value == "auto" else value


class HyperparametersAsked(RequestModel):
    """None: `auto`, which is LeMix's default."""

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
            learning_rate_multiplier=self.learning_rate_multiplier or DEFAULT_LEARNING_RATE_MULTIPLIER,
        )


class SupervisedAsked(RequestModel):
    """How a supervised job trains."""

    hyperparameters: HyperparametersAsked | None = None


class MethodAsked(RequestModel):
    """The newer place of hyperparameters."""

    type: Literal["supervised"]
    supervised: SupervisedAsked | None = None


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
    def chosen_hyperparameters(self) -> Hyperparameters:
        """From whichever place they were given in."""
        supervised = self.method.supervised if self.method else None
        asked = self.hyperparameters or (supervised.hyperparameters if supervised else None)
        return (asked or HyperparametersAsked()).chosen()

    def check_method(self) -> None:
        """Raises ApiError when the hyperparameters are given in both places."""
        if self.hyperparameters is not None and self.method is not None:
            raise invalid("hyperparameters", "'method' is given too")
