"""What a request to POST /v1/completions may say."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from services.gateway.http.errors import ApiError
from services.gateway.openai.schema import Strict, read_object, refusal, without_neutral
from services.gateway.text.tokenise import Prompt

MAX_STOPS = 4

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "suffix": (None,),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "user": (None,),
}
"""Parameters of OpenAI's that are not supported, with the values at which they change nothing."""


def _is_token_list(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _are_strings(values: list[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def _prompts(value: object) -> object:
    """One prompt or many, as a list of prompts."""
    if isinstance(value, str) or (value and _is_token_list(value)):
        return [value]
    if isinstance(value, list) and value and (_are_strings(value) or all(map(_is_token_list, value))):
        return value
    raise PydanticCustomError(
        "prompt", "expected a string, a list of token ids, a list of strings or a list of lists of token ids"
    )


def _stops(value: object) -> object:
    """One stop string or several, none of them empty."""
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise PydanticCustomError("stop", "expected a non-empty string or a list of non-empty strings")
    if len(stops) > MAX_STOPS:
        raise PydanticCustomError("stop", f"expected at most {MAX_STOPS} strings, got {len(stops)}")
    return tuple(stops)


class StreamOptions(Strict):
    """How a stream is sent."""

    include_usage: bool = False


class CompletionRequest(Strict):
    """The body of POST /v1/completions."""

    model: str
    prompt: Annotated[list[Prompt], BeforeValidator(_prompts)]
    max_tokens: int = Field(default=16, ge=0)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    n: int = Field(default=1, ge=1)
    stop: Annotated[tuple[str, ...], BeforeValidator(_stops)] = ()
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


def parse_request(body: bytes) -> CompletionRequest:
    """Read a request's body.

    Raises ApiError (400) naming the first parameter that is wrong, unknown or not supported.
    """
    content = read_object(body)
    n = content.get("n")
    neutral = {**_NEUTRAL, "best_of": (None, 1 if n is None else n)}
    return _validated(without_neutral(content, CompletionRequest.model_fields, neutral))


def _validated(content: dict[str, Any]) -> CompletionRequest:
    try:
        request = CompletionRequest.model_validate(content)
    except ValidationError as error:
        raise refusal(error) from error
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "'stream_options' is only allowed with 'stream'", param="stream_options")
    return request
