"""What a request for a fine-tuning job may say, in OpenAI's shape."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, StringConstraints, ValidationError

from services.gateway.http.errors import ApiError
from services.gateway.jobs.job import Hyperparameters
from services.gateway.openai.schema import Strict, read_object, refusal, without_neutral
from shared.examples import MAX_EXAMPLES, MAX_LEARNING_RATE_MULTIPLIER

MAX_EPOCHS = 50
MAX_SEED = 2**31 - 1
DEFAULT_EPOCHS = 3
DEFAULT_BATCH_SIZE = 8
DEFAULT_LEARNING_RATE_MULTIPLIER = 1.0

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "validation_file": (None,),
    "suffix": (None,),
    "integrations": (None, []),
}
"""Parameters of OpenAI's that are not supported, with the values at which they change nothing."""


def _auto_is_none(value: object) -> object:
    return None if value == "auto" else value


class HyperparametersAsked(Strict):
    """None: `auto`, which is LeMix's default."""

    n_epochs: Annotated[int | None, BeforeValidator(_auto_is_none)] = Field(default=None, ge=1, le=MAX_EPOCHS)
    batch_size: Annotated[int | None, BeforeValidator(_auto_is_none)] = Field(
        default=None, ge=1, le=MAX_EXAMPLES
    )
    learning_rate_multiplier: Annotated[float | None, BeforeValidator(_auto_is_none)] = Field(
        default=None, gt=0, le=MAX_LEARNING_RATE_MULTIPLIER
    )

    def chosen(self) -> Hyperparameters:
        """With LeMix's choice for what was left to it."""
        return Hyperparameters(
            n_epochs=self.n_epochs or DEFAULT_EPOCHS,
            batch_size=self.batch_size or DEFAULT_BATCH_SIZE,
            learning_rate_multiplier=self.learning_rate_multiplier or DEFAULT_LEARNING_RATE_MULTIPLIER,
        )


class SupervisedAsked(Strict):
    """How a supervised job trains."""

    hyperparameters: HyperparametersAsked | None = None


class MethodAsked(Strict):
    """The newer place of hyperparameters."""

    type: Literal["supervised"]
    supervised: SupervisedAsked | None = None


MetadataKey = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class JobRequest(Strict):
    """The body of POST /v1/fine_tuning/jobs."""

    model: str
    training_file: str
    hyperparameters: HyperparametersAsked | None = None
    method: MethodAsked | None = None
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    metadata: dict[MetadataKey, MetadataValue] | None = Field(default=None, max_length=16)

    @property
    def chosen_hyperparameters(self) -> Hyperparameters:
        """From whichever place they were given in."""
        supervised = self.method.supervised if self.method else None
        asked = self.hyperparameters or (supervised.hyperparameters if supervised else None)
        return (asked or HyperparametersAsked()).chosen()


def parse_job_request(body: bytes) -> JobRequest:
    """Raises ApiError (400) naming the first parameter that is wrong, unknown or not supported."""
    content = without_neutral(read_object(body), JobRequest.model_fields, _NEUTRAL)
    try:
        request = JobRequest.model_validate(content)
    except ValidationError as error:
        raise refusal(error) from error
    if request.hyperparameters is not None and request.method is not None:
        message = "'hyperparameters' and 'method' cannot both be given"
        raise ApiError(400, message, param="hyperparameters", code="invalid_value")
    return request
