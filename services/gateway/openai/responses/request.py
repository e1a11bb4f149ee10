"""The parameters of POST /v1/responses."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from services.gateway.openai.answers import Json
from services.gateway.openai.chat.messages import MAX_MESSAGES
from services.gateway.openai.chat.request import AnswerLimit, ChatRequest, JsonSchema, TopLogprobs
from services.gateway.openai.chat.tools import MAX_TOOLS, Function, ToolMode
from services.gateway.openai.neutral import Empty, NeutralParameters
from services.gateway.openai.objective import ObjectiveParameters
from services.gateway.openai.responses.items import Item, chat_messages
from services.gateway.openai.schema import RequestModel

Includable = Literal[
    "message.output_text.logprobs",
    # Of things that no answer here contains:
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]


def _as_items(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _refuse_memory(value: object) -> object:
    raise PydanticCustomError("memory", "responses are not stored: send the whole conversation in 'input'")


Unstored = Annotated[None, BeforeValidator(_refuse_memory, json_schema_input_type=None)]
Items = Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES - 1, fail_fast=True)]
"""The instructions may be one more message of the chat."""


class FunctionTool(Function):
    """A function that the model may call. There are no built-in tools."""

    type: Literal["function"]

    def for_chat(self) -> Json:
        """The same tool in a chat request."""
        return {"type": self.type, "function": self.model_dump(exclude={"type"}, exclude_unset=True)}


def _only_functions(tool: object) -> object:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if isinstance(kind, str) and kind != "function":
        raise PydanticCustomError(
            "tool", "tools of type '{kind}' are not supported, only 'function'", {"kind": kind}
        )
    return tool


Tool = Annotated[FunctionTool, BeforeValidator(_only_functions)]


class NamedFunction(RequestModel):
    """The function that must be called."""

    type: Literal["function"]
    name: str

    def for_chat(self) -> Json:
        """The same choice in a chat request."""
        return {"type": self.type, "function": {"name": self.name}}


ToolChoice = Annotated[
    Annotated[ToolMode, Tag("[mode]")] | Annotated[NamedFunction, Tag("[function]")],
    Discriminator(lambda choice: "[mode]" if isinstance(choice, str) else "[function]"),
]


class PlainFormat(RequestModel):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"] = "text"

    def for_chat(self) -> Json:
        """The same format in a chat request."""
        return {"type": self.type}


class SchemaFormat(JsonSchema):
    """JSON of a schema."""

    type: Literal["json_schema"]

    def for_chat(self) -> Json:
        """The same format in a chat request."""
        return {"type": self.type, "json_schema": self.model_dump(exclude={"type"}, by_alias=True)}


def _format_kind(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "[schema]" if kind == "json_schema" else "[plain]"


TextFormat = Annotated[
    Annotated[PlainFormat, Tag("[plain]")] | Annotated[SchemaFormat, Tag("[schema]")],
    Discriminator(_format_kind),
]


class TextOptions(RequestModel):
    """The form of the text."""

    format: TextFormat = PlainFormat()
    verbosity: Literal["medium"] = "medium"


class ReasoningOptions(RequestModel):
    """How the model is to think: no effort is asked of it, and nothing is told of its thoughts."""

    effort: Literal["none"] | None = None
    summary: None = None
    generate_summary: None = None


class StreamOptions(RequestModel):
    """How a stream is sent."""

    include_obfuscation: bool = False
    """Accepted; events carry no padding."""


class ResponseRequest(ObjectiveParameters, NeutralParameters):
    """The body of POST /v1/responses."""

    model: str
    input: Annotated[Items, BeforeValidator(_as_items, json_schema_input_type=str | Items)]
    instructions: str | None = None
    max_output_tokens: AnswerLimit | None = None
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    text: TextOptions = TextOptions()
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    include: list[Includable] = Field(default_factory=list, fail_fast=True)
    top_logprobs: TopLogprobs = 0
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    store: bool = False
    """Remember the answer, so that it can be corrected; no other request sees it."""

    # Answers are not stored for later requests.
    previous_response_id: Unstored = None
    conversation: Unstored = None
    prompt: Unstored = None
    background: Literal[False] = False

    # OpenAI's, accepted only where they change nothing.
    context_management: Empty = Field(default_factory=list)
    max_tool_calls: AnswerLimit | None = None
    """Counts calls of built-in tools."""
    moderation: None = None
    reasoning: ReasoningOptions = ReasoningOptions()
    truncation: Literal["disabled"] = "disabled"

    @property
    def with_logprobs(self) -> bool:
        """Whether the log-probabilities of tokens are wanted."""
        return "message.output_text.logprobs" in self.include

    def for_chat(self) -> ChatRequest:
        """The chat request that asks the same of the model."""
        choice = self.tool_choice
        fields = {
            "model": self.model,
            "lemix": self.lemix,
            "service_tier": self.service_tier,
            "messages": chat_messages(self.input, self.instructions),
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "response_format": self.text.format.for_chat(),
            "tools": [tool.for_chat() for tool in self.tools],
            "tool_choice": choice if isinstance(choice, str) else choice.for_chat(),
            "parallel_tool_calls": self.parallel_tool_calls,
            "logprobs": self.with_logprobs,
            "top_logprobs": self.top_logprobs if self.with_logprobs else None,
        }
        return ChatRequest.model_validate(fields)
