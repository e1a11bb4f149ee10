"""JSON Schemas drawn from a seed, whose texts all have an end."""

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

_WORDS = ("name", "size", "of", "tags", "kind", "left", "right", "é", "a b", "n-1")


def random_schema(seed: int) -> Schema:
    """Nested objects, arrays, choices, references, and leaves of all types."""
    chance = random.Random(seed)
    definitions = {f"d{number}": _schema(chance, depth=1, num_definitions=0) for number in range(2)}
    return {"$defs": definitions, **_schema(chance, depth=3, num_definitions=len(definitions))}


def _schema(chance: random.Random, *, depth: int, num_definitions: int) -> Schema:
    def inner() -> Schema:
        return _schema(chance, depth=depth - 1, num_definitions=num_definitions)

    kinds: list[Callable[[], Schema]] = [lambda: _leaf(chance)] * 3
    if num_definitions:
        kinds.append(lambda: {"$ref": f"#/$defs/d{chance.randrange(num_definitions)}"})
    if depth:
        kinds += [lambda: _object(chance, inner)] * 4
        kinds += [lambda: _array(chance, inner), lambda: _pair(inner), lambda: _choice(inner)]
    return chance.choice(kinds)()


def _leaf(chance: random.Random) -> Schema:
    least = chance.randint(-50, 50)
    leaves: list[Schema] = [
        {"type": "boolean"},
        {"type": "null"},
        {"type": "integer", "minimum": least, "maximum": least + chance.randint(0, 900)},
        {"type": "number", "minimum": -2.5, "exclusiveMaximum": 9},
        {"type": "string", "minLength": 1, "maxLength": chance.randint(1, 9)},
        {"type": "string", "pattern": "^[A-Z][a-z]{1,4}( [0-9]{2})?$"},
        {"type": "string", "format": "date"},
        {"enum": chance.sample([*_WORDS, 1, 2.5, None, True], 3)},
        {"const": chance.choice([*_WORDS, 7, {"a": [1, None]}])},
    ]
    return chance.choice(leaves)


def _object(chance: random.Random, inner: Callable[[], Schema]) -> Schema:
    properties = {name: inner() for name in chance.sample(_WORDS, chance.randint(1, 4))}
    required = [name for name in properties if chance.random() < 0.6]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _array(chance: random.Random, inner: Callable[[], Schema]) -> Schema:
    least = chance.randint(0, 2)
    return {"type": "array", "items": inner(), "minItems": least, "maxItems": least + chance.randint(0, 2)}


def _pair(inner: Callable[[], Schema]) -> Schema:
    return {"type": "array", "prefixItems": [inner(), inner()], "items": False, "minItems": 2}


def _choice(inner: Callable[[], Schema]) -> Schema:
    return {"anyOf": [inner(), inner(), {"type": "null"}]}
