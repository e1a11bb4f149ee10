"""Which JSON Schemas are taken, and what is said of the others."""

import json
from typing import Any

import pytest

from shared.errors import UnsupportedSchemaError
from shared.structured_output import JSON_OBJECT_SCHEMA, MAX_SCHEMA_CHARACTERS, check_grammar, grammar_of

TAKEN: list[Any] = [
    {},
    {"type": "string", "minLength": 1, "maxLength": 8},
    {"type": "string", "pattern": "^[a-z]+$"},
    {"type": "string", "format": "date-time"},
    {"type": "integer", "minimum": 0, "exclusiveMaximum": 10},
    {"type": "number", "multipleOf": 0.5},
    {"enum": ["a", 1, None]},
    {"const": {"a": [1]}},
    {"anyOf": [{"type": "string"}, {"type": "null"}]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "integer"}], "items": False},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    {"type": "object", "patternProperties": {"^a": {"type": "string"}}},
    {"allOf": [{"properties": {"a": {"type": "integer"}}}, {"required": ["a"]}], "type": "object"},
    {"$defs": {"n": {"properties": {"next": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"},
    {"title": "A", "description": "b", "default": {}, "examples": [], "type": "object"},
]

REFUSED: list[tuple[Any, str]] = [
    ([1], "no JSON object"),
    (5, "no JSON object"),
    ({"type": "text"}, "Invalid type: text"),
    ({"not": {"type": "string"}}, '"not"'),
    ({"if": {}, "then": {}}, '"if"'),
    ({"type": "array", "uniqueItems": True}, '"uniqueItems"'),
    ({"type": "object", "unevaluatedProperties": False}, '"unevaluatedProperties"'),
    ({"type": "string", "format": "colour"}, "colour"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
    ({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}, "oneOf"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum (5) is greater than maximum (3)"),
    ({"enum": []}, "empty"),
    ({"$ref": "#/$defs/a"}, "/$defs/a"),
    ({"$ref": "http://example.org/schema"}, "http://example.org/schema"),
    ({"$defs": {"n": {"$ref": "#/$defs/n"}}, "$ref": "#/$defs/n"}, "nothing but itself"),
    ({"x-guidance": {"lenient": True}, "not": {}}, '"not"'),
    ({"description": "a" * MAX_SCHEMA_CHARACTERS}, f"{MAX_SCHEMA_CHARACTERS} are allowed"),
]


@pytest.mark.parametrize("schema", [*TAKEN, json.loads(JSON_OBJECT_SCHEMA)], ids=json.dumps)
def test_a_schema_that_can_be_followed_is_taken(schema: Any) -> None:
    check_grammar(grammar_of(json.dumps(schema)))


@pytest.mark.parametrize(("schema", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_any_other_is_refused_with_the_reason(schema: Any, reason: str) -> None:
    with pytest.raises(UnsupportedSchemaError) as refusal:
        check_grammar(grammar_of(json.dumps(schema)))
    assert reason in str(refusal.value)


@pytest.mark.parametrize("text", ["", "no JSON", '{"const": NaN}', '{"a": "\ud800"}', "{" * 100_000])
def test_what_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(UnsupportedSchemaError):
        check_grammar(grammar_of(text))


@pytest.mark.parametrize("depth", [100, 1500])
def test_deep_schemas_are_taken_or_refused_but_end_nothing(depth: int) -> None:
    schema = '{"type":"array","items":' * depth + "{}" + "}" * depth
    try:
        check_grammar(grammar_of(schema))
    except UnsupportedSchemaError as refusal:
        assert "recursion" in str(refusal)
