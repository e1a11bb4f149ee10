"""The items of a conversation in the Responses API, and the same conversation as messages of a chat."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from services.gateway.openai.schema import RequestModel

Json = dict[str, Any]
Status = Literal["in_progress", "completed", "incomplete"]

MAX_PARTS = 2048
"""Pieces of text of one item."""


class TextPart(RequestModel):
    """A piece of text that somebody wrote."""

    type: Literal["input_text", "output_text"]
    text: str

    # What answers have beside the text; it is not read.
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[Any] = Field(default_factory=list)


def _as_parts(value: object) -> object:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


Parts = Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
Text = Annotated[Parts, BeforeValidator(_as_parts, json_schema_input_type=str | Parts)]


class MessageItem(RequestModel):
    """A message in the conversation."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Text
    id: str = ""
    status: Status = "completed"
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCallItem(RequestModel):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str = ""
    status: Status = "completed"


class FunctionCallOutputItem(RequestModel):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: Text
    id: str = ""
    status: Status = "completed"


def _kind(item: object) -> str | None:
    """The tag of an item's model; a message need not say what it is."""
    kind = item.get("type") or "message" if isinstance(item, dict) else None
    return f"[{kind}]" if isinstance(kind, str) else None


Item = Annotated[
    Annotated[MessageItem, Tag("[message]")]
    | Annotated[FunctionCallItem, Tag("[function_call]")]
    | Annotated[FunctionCallOutputItem, Tag("[function_call_output]")],
    Discriminator(
        _kind,
        custom_error_type="item",
        custom_error_message="only messages, function_call and function_call_output are supported",
    ),
]


def chat_messages(items: Sequence[Item], instructions: str | None) -> list[Json]:
    """The conversation as a chat has it: calls belong to the message of the assistant before them."""
    messages: list[Json] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    for item in items:
        match item:
            case MessageItem():
                messages.append({"role": item.role, "content": _chat_parts(item.content)})
            case FunctionCallItem():
                _assistant(messages).setdefault("tool_calls", []).append(_chat_call(item))
            case FunctionCallOutputItem():
                content = _chat_parts(item.output)
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": content})
    return messages


def _chat_parts(parts: Sequence[TextPart]) -> list[Json]:
    return [{"type": "text", "text": part.text} for part in parts]


def _assistant(messages: list[Json]) -> Json:
    """The last message, which is the assistant's."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant"})
    return messages[-1]


def _chat_call(item: FunctionCallItem) -> Json:
    return {
        "id": item.call_id,
        "type": "function",
        "function": {"name": item.name, "arguments": item.arguments},
    }
