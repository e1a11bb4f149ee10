"""Training examples as people write them: five forms, read strictly; in files, one a line."""

from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from shared.errors import InvalidBatchError

MAX_EXAMPLES = 4096
"""Most examples in one batch."""
MAX_LEARNING_RATE_MULTIPLIER = 1e6
"""Keeps every learning rate finite that a multiplier gives."""
DEFAULT_MULTIPLIER = 1.0
DEFAULT_MULTIPLIER_OF_PREFERENCES = 0.2
"""A factor of the learning rate; docs/training.md says why it is so low."""
DEFAULT_BETA = 0.1
MAX_BETA = 2.0
"""As in OpenAI's API."""


class Strict(BaseModel):
    """No coercion and no unknown keys: what was sent is what is meant."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PromptCompletion(Strict):
    """Learn the completion, given the prompt."""

    prompt: str
    completion: str


def _joined_text(content: object) -> object:
    """Text parts as one text. Raises ValueError naming a part that is not text."""
    if not isinstance(content, list):
        return content
    kinds = [part.get("type") if isinstance(part, dict) else None for part in content]
    if others := [kind for kind in kinds if kind != "text"]:
        raise ValueError(f"a content part of type {others[0]!r} cannot be learnt, only text")
    texts = [part.get("text") for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a content part of type 'text' has no text")
    return "".join(texts)


class ChatMessage(Strict):
    """One turn of a conversation, as in OpenAI's files of training examples."""

    role: str
    content: Annotated[str | None, BeforeValidator(_joined_text)] = None
    reasoning_content: str | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    weight: Literal[0, 1] | None = None
    """0: the assistant says it, and it is not learnt."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("has neither content nor tool_calls")
        if self.role != "assistant" and self.weight is not None:
            raise ValueError(f"weight is for messages of the assistant, not of {self.role!r}")
        if self.role != "assistant" and self.tool_calls:
            raise ValueError(f"tool_calls are for messages of the assistant, not of {self.role!r}")
        return self

    @property
    def is_learnt(self) -> bool:
        return self.role == "assistant" and self.weight != 0


class Conversation(Strict):
    """Learn what the assistant says."""

    messages: list[ChatMessage] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    parallel_tool_calls: bool | None = None
    """OpenAI's; what was called together is in the messages, so that it changes nothing."""


class PlainText(Strict):
    """Learn the text."""

    text: str


class TokenIds(Strict):
    """Learn the tokens as they are."""

    token_ids: list[int]


class Preference(Strict):
    """Learn to give the one answer rather than the other; OpenAI's form. Nothing of the input is learnt."""

    input: Conversation
    preferred_output: list[ChatMessage] = Field(min_length=1, max_length=1)
    non_preferred_output: list[ChatMessage] = Field(min_length=1, max_length=1)

    @field_validator("preferred_output", "non_preferred_output")
    @classmethod
    def _is_an_answer(cls, output: list[ChatMessage]) -> list[ChatMessage]:
        if not output[0].is_learnt:
            raise ValueError("must be a message of the assistant, without weight 0")
        return output

    @model_validator(mode="after")
    def _tells_something(self) -> Self:
        if self.preferred_output == self.non_preferred_output:
            raise ValueError("preferred_output and non_preferred_output are the same")
        return self

    @property
    def conversations(self) -> dict[str, Conversation]:
        """The input with either output, of which that alone is learnt; the preferred one comes first."""
        said_before = [
            message.model_copy(update={"weight": 0}) if message.is_learnt else message
            for message in self.input.messages
        ]
        outputs = {
            "preferred_output": self.preferred_output,
            "non_preferred_output": self.non_preferred_output,
        }
        return {
            name: self.input.model_copy(update={"messages": [*said_before, *output]})
            for name, output in outputs.items()
        }


_KIND_BY_KEY = {
    "prompt": "completion",
    "completion": "completion",
    "messages": "messages",
    "text": "text",
    "token_ids": "token_ids",
    "input": "preference",
    "preferred_output": "preference",
    "non_preferred_output": "preference",
}


def _kind(example: object) -> str | None:
    keys = example if isinstance(example, dict) else ()
    return next((kind for key, kind in _KIND_BY_KEY.items() if key in keys), None)


Example = PromptCompletion | Conversation | PlainText | TokenIds
"""One sequence of tokens, parts of which are learnt."""

AnyExample = Annotated[
    Annotated[PromptCompletion, Tag("completion")]
    | Annotated[Conversation, Tag("messages")]
    | Annotated[PlainText, Tag("text")]
    | Annotated[TokenIds, Tag("token_ids")]
    | Annotated[Preference, Tag("preference")],
    Discriminator(
        _kind,
        custom_error_type="example",
        custom_error_message="has none of the keys prompt and completion, messages, text, token_ids, "
        "input and preferred_output",
    ),
]

_EXAMPLE: TypeAdapter[AnyExample] = TypeAdapter(AnyExample)


def numbered_lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers from 1, and without a byte-order mark."""
    for number, line in enumerate(content.removeprefix(BOM_UTF8).split(b"\n"), start=1):
        if stripped := line.strip():
            yield number, stripped


def read_example(line: bytes) -> AnyExample:
    """Read one example from JSON. Raises InvalidBatchError with the first fault."""
    try:
        return _EXAMPLE.validate_json(line)
    except ValidationError as error:
        raise InvalidBatchError(first_fault(error, kind_at=0)) from error


def first_fault(error: ValidationError, *, kind_at: int | None) -> str:
    """Where in the JSON the first fault is, and what it is.

    The place of a fault within an example also has pydantic's name for its kind, which is no key of the
    JSON; `kind_at` says where, None that there is none.
    """
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = [str(part) for position, part in enumerate(fault["loc"]) if position != kind_at]
    reason = str(fault["msg"]).removeprefix("Value error, ")
    return f"{'.'.join(place)}: {reason}" if place else reason
