"""The JSON that a model must write when it has to call a tool."""

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from services.gateway.openai.chat.tools import Function, Tool, ToolChoice, call_schema
from services.gateway.openai.tool_calls import ToolCallDelta, ToolCallParser
from shared.structured_output import check_schema

TREE: dict[str, Any] = {
    "type": "object",
    "properties": {"root": {"$ref": "#/$defs/Node"}},
    "required": ["root"],
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {"children": {"type": "array", "items": {"$ref": "#/$defs/Node"}}},
            "additionalProperties": False,
        }
    },
}


def tool(name: str, parameters: dict[str, Any] | None = None) -> Tool:
    return Tool(type="function", function=Function(name=name, parameters=parameters))


TOOLS = [tool("plant", TREE), tool("stop")]
PLANT = {"name": "plant", "arguments": {"root": {"children": [{}, {"children": []}]}}}


def schema_of(choice: ToolChoice) -> Draft202012Validator:
    text = call_schema(TOOLS, choice)
    assert text is not None
    check_schema(text)
    return Draft202012Validator(json.loads(text))


def test_any_tool_may_be_the_one_that_is_required() -> None:
    schema = schema_of(ToolChoice("required"))
    assert schema.is_valid(PLANT)
    assert schema.is_valid({"name": "stop", "arguments": {"any": 1}})
    assert not schema.is_valid({"name": "plant", "arguments": {"root": 3}})
    assert not schema.is_valid({"name": "plant", "arguments": {"root": {"children": [3]}}})
    assert not schema.is_valid({"name": "stop", "arguments": 3})
    assert not schema.is_valid({"name": "other", "arguments": {}})


def test_a_named_tool_is_the_only_one() -> None:
    schema = schema_of(ToolChoice("required", "plant"))
    assert schema.is_valid(PLANT)
    assert not schema.is_valid({"name": "stop", "arguments": {}})


@pytest.mark.parametrize("mode", ["none", "auto"])
def test_what_need_not_be_called_has_no_schema(mode: Any) -> None:
    assert call_schema(TOOLS, ToolChoice(mode)) is None


def test_what_is_written_by_the_schema_is_read_as_a_call() -> None:
    [call] = ToolCallParser(lambda: "call-1").push(json.dumps(PLANT))
    assert isinstance(call, ToolCallDelta)
    assert (call.name, json.loads(call.arguments)) == ("plant", PLANT["arguments"])
