"""The parameters of POST /v1/chat/completions."""

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from services.gateway.openai.chat.messages import MAX_MESSAGES, Message
from services.gateway.openai.chat.template_variables import TemplateVariables
from services.gateway.openai.chat.tools import (
    MAX_TOOLS,
    NamedTool,
    Tool,
    ToolChoice,
    ToolMode,
    as_tool_choice,
)
from services.gateway.openai.neutral import NeutralChatParameters
from services.gateway.openai.parameters import GenerationParameters
from services.gateway.openai.schema import AS_WHOLE, RequestModel
from shared.structured_output import JSON_OBJECT_SCHEMA

AnswerLimit = Annotated[int, Field(ge=1), AS_WHOLE]
TopLogprobs = Annotated[int, Field(ge=0, le=20), AS_WHOLE]


class JsonSchema(RequestModel):
    """The schema that an answer is held to."""

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    json_schema: dict[str, Any] = Field(alias="schema")
    description: str = ""
    strict: bool = False
    """The answer follows the schema in any case."""


class ResponseFormat(RequestModel):
    """The form that the answer's text must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("format", "'json_schema' belongs to the type 'json_schema'")
        return self

    @property
    def schema_text(self) -> str | None:
        """The JSON Schema of the answer; None: any text."""
        match self.type:
            case "json_schema":
                assert self.json_schema is not None, "it has been checked"
                return json.dumps(self.json_schema.json_schema)
            case "json_object":
                return JSON_OBJECT_SCHEMA
            case _:
                return None


class ChatRequest(GenerationParameters, NeutralChatParameters):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_tokens: AnswerLimit | None = None
    max_completion_tokens: AnswerLimit | None = None
    logprobs: bool = False
    top_logprobs: TopLogprobs | None = None
    response_format: ResponseFormat = ResponseFormat(type="text")
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: Annotated[
        ToolChoice, BeforeValidator(as_tool_choice, json_schema_input_type=ToolMode | NamedTool)
    ] = Field(default_factory=lambda: ToolChoice("auto"))
    parallel_tool_calls: bool = True
    chat_template_kwargs: TemplateVariables = Field(default_factory=dict)

    @property
    def may_call_tools(self) -> bool:
        """Whether the model is told of the tools, and its calls are looked for."""
        return bool(self.tools) and self.tool_choice.mode != "none"

    @property
    def may_need_grammar(self) -> bool:
        """Whether the answer may have to follow a schema."""
        return self.may_call_tools or self.response_format.type != "text"

    @property
    def num_logprobs(self) -> int | None:
        """How many likely tokens to tell beside each one; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None
