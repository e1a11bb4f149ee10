"""The JSON that a model must write when it has to call a tool."""

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from llguidance import LLMatcher, LLTokenizer

from services.gateway.openai.chat.tools import (
    Function,
    Tool,
    ToolChoice,
    call_schema,
    strict_calls_grammar,
)
from services.gateway.openai.tool_calls import ToolCallDelta, ToolCallParser
from shared.structured_output import check_grammar, grammar_of

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


def tool(name: str, parameters: dict[str, Any] | None = None, *, strict: bool = False) -> Tool:
    return Tool(type="function", function=Function(name=name, parameters=parameters, strict=strict))


TOOLS = [tool("plant", TREE), tool("stop")]
PLANT = {"name": "plant", "arguments": {"root": {"children": [{}, {"children": []}]}}}


def schema_of(choice: ToolChoice) -> Draft202012Validator:
    text = call_schema(TOOLS, choice)
    assert text is not None
    check_grammar(grammar_of(text))
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


STRICT_TOOLS = [tool("plant", TREE, strict=True), tool("stop")]
TAGS, BARE = "{{ '<tool_call>' }}", "{{ messages }}"


def allows(grammar: str, text: str) -> bool:
    """Whether a model that is held to the grammar can write this text, and end there."""
    matcher = LLMatcher(LLTokenizer("byte"), grammar)
    tokens = list(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def in_tags(call: dict[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def test_calls_of_strict_tools_follow_their_schemas_wherever_they_stand_in_a_text() -> None:
    grammar = strict_calls_grammar(STRICT_TOOLS, TAGS)
    assert grammar is not None
    check_grammar(grammar)
    stop = {"name": "stop", "arguments": {"any": [1]}}
    wrong = {"name": "plant", "arguments": {"root": 3}}
    assert allows(grammar, "No tool is needed: 2 < 3.")
    assert allows(grammar, f"I plant.\n{in_tags(PLANT)}\n{in_tags(stop)}")
    assert not allows(grammar, in_tags(wrong))
    assert not allows(grammar, in_tags({"name": "other", "arguments": {}}))
    assert not allows(grammar, "<tool_call>\nno JSON")


def test_a_model_without_tags_writes_bare_calls() -> None:
    grammar = strict_calls_grammar(STRICT_TOOLS, BARE)
    assert grammar is not None
    assert allows(grammar, json.dumps({"name": "plant", "parameters": PLANT["arguments"]}))
    assert not allows(grammar, json.dumps({"name": "plant", "parameters": {"root": 3}}))


def test_tools_that_are_not_strict_leave_the_text_free() -> None:
    assert strict_calls_grammar(TOOLS, TAGS) is None
