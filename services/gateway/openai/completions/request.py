"""The parameters of POST /v1/completions."""

from typing import Annotated

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from services.gateway.openai.neutral import NeutralCompletionParameters
from services.gateway.openai.parameters import GenerationParameters
from services.gateway.openai.schema import AS_WHOLE, invalid
from services.gateway.text.tokenise import Prompt

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 2048


def _is_token_list(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _are_strings(values: list[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def _as_prompts(value: object) -> object:
    """One prompt or many, as a list of prompts."""
    if isinstance(value, str) or (value and _is_token_list(value)):
        return [value]
    if isinstance(value, list) and value:
        begin = value[: MAX_PROMPTS + 1]  # more are refused, whatever they are
        if _are_strings(begin) or all(map(_is_token_list, begin)):
            return value
    raise PydanticCustomError(
        "prompt", "expected a string, a list of token ids, a list of strings or a list of lists of token ids"
    )


def _false_is_none(value: object) -> object:
    return None if value is False else value


Several = Field(min_length=1)
Prompts = (
    str | Annotated[list[str], Several] | Annotated[list[int], Several] | Annotated[list[list[int]], Several]
)
BestOf = Annotated[int, Field(ge=1), AS_WHOLE]
Logprobs = Annotated[int, Field(ge=0, le=5), AS_WHOLE]


class CompletionRequest(GenerationParameters, NeutralCompletionParameters):
    """The body of POST /v1/completions."""

    prompt: Annotated[
        list[Prompt],
        Field(max_length=MAX_PROMPTS),
        BeforeValidator(_as_prompts, json_schema_input_type=Prompts),
    ]
    logprobs: Annotated[Logprobs | None, BeforeValidator(_false_is_none)] = None
    echo: bool = False
    best_of: BestOf | None = None
    """As many as `n`: all choices that are drawn are given."""

    @property
    def num_tokens(self) -> int:
        """How many tokens to generate at most. Raises ApiError."""
        limit = self.token_limit
        return DEFAULT_MAX_TOKENS if limit is None else limit

    def check_best_of(self) -> None:
        """Raises ApiError when more choices are to be drawn than given."""
        if self.best_of is not None and self.best_of != self.n:
            raise invalid("best_of", f"only the value of 'n' ({self.n}) is supported")
