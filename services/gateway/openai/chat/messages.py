"""The messages of a conversation, as a request to POST /v1/chat/completions has them."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from services.gateway.openai.neutral import Empty
from services.gateway.openai.schema import RequestModel


class TextPart(RequestModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


def _as_text(content: object) -> object:
    """Text as it is, parts of text as one: each on lines of its own."""
    if not isinstance(content, list) or not content:
        return content
    return "\n".join(map(_text_of_part, content))


def _text_of_part(part: object) -> str:
    match part:
        case {"type": "text", "text": str(text), **others} if not others:
            return text
        case {"type": str(kind)} if kind != "text":
            raise PydanticCustomError(
                "content", "parts of type '{kind}' are not supported, only 'text'", {"kind": kind}
            )
        case _:
            raise PydanticCustomError("content", "expected text, or parts like {'type': 'text', 'text': ...}")


MAX_MESSAGES = 2048
MAX_CALLS = 128
"""Most calls in one message."""

Parts = Annotated[list[TextPart], Field(min_length=1)]
Content = Annotated[str, BeforeValidator(_as_text, json_schema_input_type=str | Parts)]


class SystemMessage(RequestModel):
    """How the assistant is to answer."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(RequestModel):
    """A person's message."""

    role: Literal["user"]
    content: Content
    name: str | None = None


ClientsOwn = Annotated[Any, Field(exclude=True)]
"""Fields that clients add to an answer when they put it together or parse it, and send back with it."""


class FunctionCall(RequestModel):
    """A function, and the arguments to call it with."""

    name: str
    arguments: str
    """JSON."""
    parsed_arguments: ClientsOwn = None


class ToolCall(RequestModel):
    """A call that the assistant has made."""

    id: str
    type: Literal["function"]
    function: FunctionCall
    index: ClientsOwn = None


class AssistantMessage(RequestModel):
    """A message of the assistant, or the tools it has called."""

    role: Literal["assistant"]
    content: Content | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = Field(default=None, max_length=MAX_CALLS, fail_fast=True)
    name: str | None = None
    reasoning_content: str | None = None
    """Its thoughts, for templates that show those of earlier answers."""
    reasoning: str | None = None

    # In answers of OpenAI's, which clients send back as they are.
    audio: None = None
    function_call: None = None
    annotations: Empty = Field(default_factory=list)
    parsed: ClientsOwn = None

    @model_validator(mode="after")
    def _says_something(self) -> "AssistantMessage":
        if self.content is None and self.refusal is None and not self.tool_calls:
            raise PydanticCustomError("message", "an assistant message needs 'content' or 'tool_calls'")
        return self


class ToolMessage(RequestModel):
    """The answer of a tool."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


def _role(message: object) -> str | None:
    """The tag of a message's model; brackets keep it out of the names of parameters."""
    role = message.get("role") if isinstance(message, dict) else getattr(message, "role", None)
    return {
        "system": "[system]",
        "developer": "[system]",
        "user": "[user]",
        "assistant": "[assistant]",
        "tool": "[tool]",
    }.get(role if isinstance(role, str) else "")


Message = Annotated[
    Annotated[SystemMessage, Tag("[system]")]
    | Annotated[UserMessage, Tag("[user]")]
    | Annotated[AssistantMessage, Tag("[assistant]")]
    | Annotated[ToolMessage, Tag("[tool]")],
    Discriminator(
        _role,
        custom_error_type="message",
        custom_error_message="expected a message with a role: system, developer, user, assistant or tool",
    ),
]


def for_template(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it: what was given, with roles and contents that they know."""
    fields = message.model_dump(exclude_unset=True, exclude={"refusal", "annotations"})
    if message.role == "developer":
        fields["role"] = "system"
    if isinstance(message, AssistantMessage) and message.content is None and message.refusal is not None:
        fields["content"] = message.refusal
    return fields
