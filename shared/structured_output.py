"""Grammars that a text can be held to while it is written, by llguidance. Never loads torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, StructTag, TokenizerWrapper

from shared.errors import UnsupportedSchemaError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_SCHEMA_CHARACTERS = 65_536
"""Longest JSON text of a schema; one of this size takes about half a second to compile."""

JSON_OBJECT_SCHEMA = '{"type":"object"}'
"""Any JSON object."""

LIMITS = LLParserLimits(verbose_errors=False)

_WHITESPACE = r" |\n {0,16}"
"""At most so much of it between two tokens of JSON: it never goes on without end."""

_END_OF_TEXT = 256


_JSON_OPTIONS: "JsonCompileOptions" = {  # all that a schema could choose for itself with `x-guidance`
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": _WHITESPACE,
    "coerce_one_of": False,
    "lenient": False,
}


def grammar_of(schema: str) -> str:
    """The grammar of all texts that are JSON of this JSON Schema (JSON text), as llguidance reads it.

    Raises UnsupportedSchemaError when the schema is no JSON object, or too long.
    """
    _check_length(schema)
    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)
    except (ValueError, UnicodeEncodeError) as error:
        raise UnsupportedSchemaError(f"the schema is no JSON object: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonInText:
    """JSON that may stand anywhere in a text, between two marks."""

    opening: str
    schema: Mapping[str, object]
    closing: str


def grammar_of_text_with(trigger: str, forms: Sequence[JsonInText]) -> str:
    """The grammar of all texts in which one of `forms` stands wherever `trigger` does.

    Each form's opening begins with the trigger. Raises UnsupportedSchemaError when a schema is too long.
    """
    for form in forms:
        _check_length(json.dumps(form.schema))
    tags = [
        StructTag(
            trigger=trigger,
            begin=form.opening,
            grammar={**form.schema, "x-guidance": dict(_JSON_OPTIONS)},
            end=form.closing,
        )
        for form in forms
    ]
    return StructTag.to_grammar(tags, assume_special=False)


def check_grammar(grammar: str) -> None:
    """Raises UnsupportedSchemaError, which says why, when no text can be held to this grammar.

    Compiles it: up to half a second for the largest, without the interpreter lock; call it in a thread.
    """
    matcher = LLMatcher(_byte_tokenizer(), grammar, log_level=0, limits=LIMITS)
    matcher.compute_bitmask()  # finds out whether a text can begin at all
    raise_error_of(matcher)


def _check_length(schema: str) -> None:
    if len(schema) > MAX_SCHEMA_CHARACTERS:
        raise UnsupportedSchemaError(
            f"the schema has {len(schema)} characters; {MAX_SCHEMA_CHARACTERS} are allowed"
        )


def raise_error_of(matcher: LLMatcher) -> None:
    """Raises UnsupportedSchemaError when the matcher has failed."""
    if not matcher.is_error():
        return
    reason = " ".join(matcher.get_error().removesuffix("<non-verbose/>").split())
    if reason.startswith("NoExtension"):
        reason = "no text can go on from here (a schema that contains nothing but itself?)"
    raise UnsupportedSchemaError(f"the schema cannot be used: {reason}")


class _Bytes:
    """A vocabulary of all bytes, as llguidance asks for one."""

    bos_token_id = None
    eos_token_id = _END_OF_TEXT
    special_token_ids = (_END_OF_TEXT,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@cache
def _byte_tokenizer() -> LLTokenizer:
    """Enough to compile a grammar; made once."""
    return LLTokenizer(TokenizerWrapper(_Bytes()))
