"""Calls of tools are found in a model's text, however the text is cut into pieces."""

import json
from collections.abc import Sequence
from itertools import count, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.openai.tool_calls import (
    Delta,
    TextDelta,
    ToolCallDelta,
    ToolCallParser,
)

CALL = '{"name": "weather", "arguments": {"city": "Zürich"}}'
LLAMA_CALL = '{"name": "weather", "parameters": {"city": "Zürich"}}'


def parsed(pieces: Sequence[str]) -> list[Delta]:
    """All that the parser gives out, with neighbouring texts joined."""
    numbers = count(1)
    parser = ToolCallParser(lambda: f"call_{next(numbers)}")
    found = [delta for piece in pieces for delta in parser.push(piece)] + parser.finish()
    joined: list[Delta] = []
    for delta in found:
        if isinstance(delta, TextDelta) and joined and isinstance(joined[-1], TextDelta):
            delta = TextDelta(joined.pop().text + delta.text)
        joined.append(delta)
    return joined


def weather(index: int = 0, city: str = "Zürich") -> ToolCallDelta:
    arguments = json.dumps({"city": city}, ensure_ascii=False)
    return ToolCallDelta(index, f"call_{index + 1}", "weather", arguments)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"<tool_call>\n{CALL}\n</tool_call>", [weather()]),
        (f"Let me see.\n\n<tool_call>{CALL}</tool_call>\n", [TextDelta("Let me see."), weather()]),
        (f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", [weather(), weather(1)]),
        (f"<tool_call>{CALL}</tool_call> Done. ", [weather(), TextDelta("Done. ")]),
        (f"<tool_call>\n{CALL}", [weather()]),
        (f"<tool_call>\n{LLAMA_CALL}</tool_call>", [weather()]),
        (LLAMA_CALL, [weather()]),
        (f"\n<|python_tag|>{LLAMA_CALL}\n", [weather()]),
        (f"{LLAMA_CALL}; {LLAMA_CALL};<|python_tag|>{LLAMA_CALL}", [weather(), weather(1), weather(2)]),
        (f"{LLAMA_CALL}\n{LLAMA_CALL}", [weather(), weather(1)]),
        ('{"type": "function", "name": "now", "parameters": {}}', [ToolCallDelta(0, "call_1", "now", "{}")]),
        (
            '<tool_call>{"name": "write", "arguments": {"text": "a\n</tool_call> \\" } b"}}</tool_call>',
            [ToolCallDelta(0, "call_1", "write", '{"text": "a\\n</tool_call> \\" } b"}')],
        ),
    ],
)
def test_calls_are_found(text: str, found: list[Delta]) -> None:
    assert parsed([text]) == parsed(text) == found


NO_CALLS = [
    "",
    " \n",
    "Plain text; with {braces} and <tags>.",
    f"Llama's form counts only at the start: {LLAMA_CALL}",
    '{"answer": 42}',
    '{"name": "Bob"}',
    '{"name": "Bob", "parameters": "none"}',
    '{"name": "", "parameters": {}}',
    "{}",
    '{"name": "a", "parameters": {"x": 1e999}}',
    '{"name": "a", "parameters": {"x": NaN}}',
    '{"name": "a", "parameters": {"x": "\\ud800"}}',
    '{"name": "a", "parameters": {"x": [}]}',
    '{"name": "a", "parameters": ' + '{"a":' * 2000 + "1" + "}" * 2001,
    '{"name": "a", "parameters": {"x": "cut off',
    "<|python_tag|>print('hello')",
    "<tool_call> no object </tool_call>",
    '<tool_call>{"name": "a", "arguments": {"x": 1',
    '<tool_call>{"city": "Zürich"}</tool_call>',
    "a < b, <tool_cal",
    "the end <",
]


@pytest.mark.parametrize("text", NO_CALLS, ids=[text[:30] for text in NO_CALLS])
def test_what_is_no_call_is_given_out_unchanged(text: str) -> None:
    assert parsed([text]) == parsed(text) == ([TextDelta(text)] if text else [])


def test_a_call_behind_one_that_is_none_is_found() -> None:
    no_call = '<tool_call>{"city": "Zürich"}</tool_call>'

    assert parsed([f"{no_call}\n<tool_call>{CALL}</tool_call>"]) == [TextDelta(no_call), weather()]


@pytest.mark.parametrize(
    ("text", "given_out"),
    [
        ("Hello, world", "Hello, world"),
        ("a <b> c <tool", "a <b> c"),
        ("<tool_call> no", "<tool_call> no"),
        ('{"answer": ', '{"answer":'),
        ('{"name": ', ""),
        ("{ 4", "{ 4"),
    ],
)
def test_no_more_is_held_than_may_be_a_call(text: str, given_out: str) -> None:
    deltas = ToolCallParser(lambda: "id").push(text)

    assert "".join(delta.text for delta in deltas if isinstance(delta, TextDelta)) == given_out


def test_a_call_is_given_out_with_its_last_brace() -> None:
    assert ToolCallParser(lambda: "call_1").push(f"<tool_call>{CALL}") == [weather()]


fifty = settings(max_examples=50)

FRAGMENTS = st.sampled_from(
    [
        *(
            "<tool_call>",
            "</tool_call>",
            "<|python_tag|>",
            ";",
            "\n",
            " ",
            "{",
            "}",
            "[",
            '"',
            "\\",
            "<",
            ">",
        ),
        *('"name"', '"a"', ":", ",", '"arguments"', '"parameters"', "{}", "1", "text", CALL, LLAMA_CALL),
    ]
)


@fifty
@given(st.lists(FRAGMENTS, max_size=20).map("".join), st.lists(st.integers(0, 200), max_size=8))
def test_cuts_change_nothing(text: str, cuts: list[int]) -> None:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})

    whole = parsed([text])

    assert parsed([text[begin:end] for begin, end in pairwise(places)]) == parsed(text) == whole
    if not any(isinstance(delta, ToolCallDelta) for delta in whole):
        assert "".join(delta.text for delta in whole) == text


def objects(values):
    return st.dictionaries(st.text(), values, max_size=3)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | objects(inner),
    max_leaves=4,
)
NAMES = st.text(min_size=1)
WORDS = st.text("ab {}[];\"'\\<>/", min_size=1).map(str.strip).filter(bool)
SPACES = st.text(" \n", max_size=2)


CALLS = st.tuples(NAMES, objects(VALUES))


@fifty
@given(st.lists(st.tuples(SPACES, WORDS | CALLS, SPACES), max_size=5))
def test_tagged_calls_are_those_that_were_written(parts) -> None:
    """Calls and words in any order; words next to each other are one text."""
    text, expected = "Yes", ["Yes"]
    for before, part, after in parts:
        if isinstance(part, tuple):
            call = json.dumps({"name": part[0], "arguments": part[1]})
            text += f"{before}<tool_call>{before}{call}{after}</tool_call>{after}"
            expected.append(part)
        elif isinstance(expected[-1], str):
            text += part
            expected[-1] += part
        else:
            text += part
            expected.append(part)

    assert contents(parsed([text])) == expected


@fifty
@given(st.lists(CALLS, min_size=1, max_size=3), SPACES, st.sampled_from(["", "<|python_tag|>"]))
def test_bare_calls_are_those_that_were_written(calls, space: str, tag: str) -> None:
    written = [json.dumps({"name": name, "parameters": arguments}) for name, arguments in calls]

    assert contents(parsed([tag + f"{space};{space}".join(written) + space])) == calls


def contents(deltas: Sequence[Delta]) -> list[object]:
    return [
        delta.text if isinstance(delta, TextDelta) else (delta.name, json.loads(delta.arguments))
        for delta in deltas
    ]
