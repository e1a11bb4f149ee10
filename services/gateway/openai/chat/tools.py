"""The tools of a chat request, and the JSON that a model must write when it has to call one."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic_core import PydanticCustomError

from services.gateway.openai.schema import RequestModel, invalid
from shared.structured_output import JsonInText, grammar_of_text_with

MAX_TOOLS = 128

ToolMode = Literal["none", "auto", "required"]


class Function(RequestModel):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON Schema of the arguments."""
    strict: bool = False
    """Hold the arguments to that schema."""


class Tool(RequestModel):
    """A tool that the model may use."""

    type: Literal["function"]
    function: Function


class FunctionName(RequestModel):
    """Names a function."""

    name: str


class NamedTool(RequestModel):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model may, must or must not call a tool."""

    mode: ToolMode
    name: str | None = None
    """With `required`: the function that must be called; None: any."""


def as_tool_choice(value: object) -> ToolChoice:
    """Reads `tool_choice`. Raises PydanticCustomError."""
    match value:
        case "none" | "auto" | "required":
            return ToolChoice(value)
        case {"type": "function", "function": {"name": str(name)}}:
            return ToolChoice("required", name)
    raise PydanticCustomError(
        "tool_choice",
        "expected 'none', 'auto', 'required' or {'type': 'function', 'function': {'name': ...}}",
    )


def check_tools(tools: Sequence[Tool], choice: ToolChoice) -> None:
    """Raises ApiError when the choice names no tool, or two tools have one name."""
    names = [tool.function.name for tool in tools]
    if choice.mode == "required" and not names:
        raise invalid("tool_choice", "there are no 'tools' to call")
    if choice.name is not None and choice.name not in names:
        raise invalid("tool_choice", f"'tools' has no function {choice.name!r}")
    for place, name in enumerate(names):
        if name in names[:place]:
            raise invalid(f"tools.{place}.function.name", "an earlier function has this name")


def strict_calls_grammar(tools: Sequence[Tool], template: str) -> str | None:
    """The grammar of text in which each call's arguments follow its schema; None: no tool is strict.

    `template` is the source of the chat template, which shows how the model writes its calls.
    Raises UnsupportedSchemaError when a schema is too long.
    """
    functions = [tool.function for tool in tools]
    if not any(function.strict for function in functions):
        return None
    in_tags = "<tool_call>" in template
    before, after = ("<tool_call>\n", "\n</tool_call>") if in_tags else ("", "")
    key = "arguments" if in_tags else "parameters"
    forms = [
        JsonInText(
            opening=f'{before}{{"name": "{function.name}", "{key}": ',
            schema={"type": "object", **((function.parameters or {}) if function.strict else {})},
            closing=f"}}{after}",
        )
        for function in functions
    ]
    return grammar_of_text_with("<tool_call>" if in_tags else '{"name":', forms)


def call_schema(tools: Sequence[Tool], choice: ToolChoice) -> str | None:
    """The schema of a call of the function that must be called; None: nothing must be called."""
    if choice.mode != "required":
        return None
    functions = [tool.function for tool in tools if choice.name in (None, tool.function.name)]
    calls = [_call_of(function.name) for function in functions]
    return json.dumps(
        {
            "$defs": {function.name: _arguments_of(function) for function in functions},
            **(calls[0] if len(calls) == 1 else {"anyOf": calls}),
        }
    )


def _call_of(name: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/{name}"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _arguments_of(function: Function) -> dict[str, Any]:
    """A function's own schema, with its references led to its new place."""
    moved: dict[str, Any] = _moved(function.parameters or {}, f"#/$defs/{function.name}")
    return {"type": "object", **moved}


def _moved(schema: Any, place: str) -> Any:
    match schema:
        case dict():
            return {
                key: place + value.removeprefix("#")
                if key == "$ref" and isinstance(value, str) and value.startswith("#")
                else _moved(value, place)
                for key, value in schema.items()
            }
        case list():
            return [_moved(item, place) for item in schema]
        case _:
            return schema
