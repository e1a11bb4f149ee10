"""Finds the calls of tools in what a model writes.

Two forms are known; the text itself shows which one it has:

- Hermes and Qwen models write `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, between other text
  or several in a row.
- Llama 3 models write nothing but `{"name": ..., "parameters": {...}}`, with `<|python_tag|>` before it or
  without, several separated by `;`.

A call is given out whole, when its JSON has come to its end: only then is it sure to be a call. What is none
is given out as the text that it is. Whitespace and separators around a call belong to it.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from services.gateway.text.stops import split_at_stop

OPENING_TAG = "<tool_call>"
CLOSING_TAG = "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
SEPARATOR = ";"

_KEYS = ("name", "arguments", "parameters", "type", "id")
_FIRST_KEY = re.compile(r'\{\s*(?:"([^"]*)"|[^"\s])')
"""The first key of an object, or whatever stands there instead of one."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that belongs to no call."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A whole call."""

    index: int
    """Calls of the same answer before it."""
    id: str
    name: str
    arguments: str
    """A JSON object."""


Delta = TextDelta | ToolCallDelta


class ToolCallParser:
    """Divides an answer into calls and text, however it is cut into pieces; holds back what may be a call."""

    def __init__(self, new_id: Callable[[], str]) -> None:
        self._new_id = new_id
        self._held = ""
        self._found: list[Delta] = []
        self._num_calls = 0
        self._tag = PYTHON_TAG
        """The text before the next object, if any."""
        self._object = _ObjectScanner(0)
        self._step = self._find_object

    def push(self, text: str) -> list[Delta]:
        """The deltas that are sure now that `text` has come."""
        self._held += text
        while self._held and self._step():
            pass
        found, self._found = self._found, []
        return found

    def finish(self) -> list[Delta]:
        """The rest when the answer ends: it is not a call."""
        rest = self._held
        if self._step == self._skip_separator:
            rest = rest.strip().removeprefix(self._separator)
        self._held = ""
        return [TextDelta(rest)] if rest else []

    # Each step is one state. It takes something off the held text or moves to another state, and says so;
    # otherwise it needs more text.

    def _find_tag(self) -> bool:
        """Text goes on until a tag; the whitespace before the tag is the tag's."""
        text, _, found = split_at_stop(self._held, (OPENING_TAG,))
        self._give_text(len(text.rstrip()))
        if found:
            self._tag, self._step = OPENING_TAG, self._find_object
        return found

    def _find_object(self) -> bool:
        begin = _end_of_mark(self._held, self._tag)
        if begin is None:
            return False
        if self._held[begin] == "{":
            self._object, self._step = _ObjectScanner(begin), self._read_object
        else:
            self._refuse(begin)
        return True

    def _read_object(self) -> bool:
        begin, end = self._object.begin, self._object.end(self._held)
        first = _FIRST_KEY.match(self._held, begin)
        if first and first[1] not in _KEYS:
            self._refuse(begin + 1)
        elif end is None:
            return False
        elif call := _read_call(self._held[begin:end]):
            self._give_call(call, end)
        else:
            self._refuse(end)
        return True

    def _skip_separator(self) -> bool:
        end = _end_of_mark(self._held, self._separator)
        if end is None:
            return False
        self._held = self._held[end:]
        self._step = self._find_tag if self._tag == OPENING_TAG else self._find_object
        return True

    @property
    def _separator(self) -> str:
        return CLOSING_TAG if self._tag == OPENING_TAG else SEPARATOR

    def _refuse(self, end: int) -> None:
        """The held text up to `end` is no call."""
        self._give_text(end)
        self._step = self._find_tag

    def _give_text(self, end: int) -> None:
        if end:
            self._found.append(TextDelta(self._held[:end]))
            self._held = self._held[end:]

    def _give_call(self, call: tuple[str, str], end: int) -> None:
        self._found.append(ToolCallDelta(self._num_calls, self._new_id(), *call))
        self._num_calls += 1
        self._held = self._held[end:]
        self._step = self._skip_separator


class _ObjectScanner:
    """Finds where a JSON object in a growing text ends; looks at each character once."""

    def __init__(self, begin: int) -> None:
        self.begin = begin
        self._place = begin
        self._depth = 0
        self._in_string = self._escaped = False

    def end(self, text: str) -> int | None:
        """The place after the object, or None while it goes on; `text` is the last one, or longer."""
        for place in range(self._place, len(text)):
            self._place = place + 1
            if self._closes(text[place]):
                return self._place
        return None

    def _closes(self, character: str) -> bool:
        """Take the next character; whether it ends the object."""
        if self._escaped:
            self._escaped = False
        elif self._in_string:
            self._escaped = character == "\\"
            self._in_string = character != '"'
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
        return self._depth == 0


def _end_of_mark(text: str, mark: str) -> int | None:
    """The place after whitespace, `mark` if it is there, and whitespace; None while that is open."""
    place = _after_whitespace(text, 0)
    if text.startswith(mark, place):
        place = _after_whitespace(text, place + len(mark))
    elif mark.startswith(text[place:]):
        return None
    return place if place < len(text) else None


def _after_whitespace(text: str, place: int) -> int:
    return len(text) - len(text[place:].lstrip())


def _read_call(text: str) -> tuple[str, str] | None:
    """Name and arguments of the call that a JSON object is, or None."""
    try:
        call = json.loads(text, strict=False)  # models write line breaks into strings
        name, arguments = call.get("name"), call.get("arguments", call.get("parameters"))
        if not (isinstance(name, str) and name and isinstance(arguments, dict)):
            return None
        encoded = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        f"{name}{encoded}".encode()  # half a surrogate pair would not go over HTTP
    except (ValueError, RecursionError):
        return None
    return name, encoded
