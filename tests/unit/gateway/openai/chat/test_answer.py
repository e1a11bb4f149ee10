"""From the pieces of a sequence to a choice and to the events of a stream."""

import json
from typing import Any

from services.gateway.generation import Versions
from services.gateway.openai.answers import Heading
from services.gateway.openai.chat.answer import ChatEvents, ChoiceReader, choice_of
from services.gateway.openai.tool_calls import ToolCallParser
from services.gateway.text.detokenise import Piece, TokenEntry
from tests.support.gateway import TOKENIZER

HEADING = Heading(
    answer_id="chatcmpl-1",
    kind="chat.completion.chunk",
    created_s=7,
    model="m",
    service_class="interactive",
)
CALL = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'


def pieces_of(*texts: str, finish: Any = "stop") -> list[Piece]:
    return [*(Piece(text, (), None) for text in texts), Piece("", (), finish)]


def reader(*, parallel_calls: bool = True) -> ChoiceReader:
    return ChoiceReader(ToolCallParser(lambda: "call-1"), parallel_calls=parallel_calls)


def choice(pieces: list[Piece], reader: ChoiceReader) -> Any:
    return choice_of(0, pieces, reader, TOKENIZER, with_logprobs=False)


def choices_of(events: bytes) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in events.decode().split("\n\n") if line]
    return [json.loads(line)["choices"][0] for line in lines]


def encoder(reader: ChoiceReader, *, with_logprobs: bool = False) -> ChatEvents:
    return ChatEvents(HEADING, [reader], TOKENIZER, include_usage=False, with_logprobs=with_logprobs)


def test_a_piece_without_anything_to_show_is_no_event() -> None:
    assert encoder(ChoiceReader(None, parallel_calls=True)).piece(0, Piece("", (), None), None) == b""


def test_a_call_is_one_event_and_the_end_another() -> None:
    events, versions = encoder(reader()), Versions(3, 4)
    sent = b"".join(events.piece(0, piece, versions) for piece in pieces_of("Hm. ", CALL[:9], CALL[9:]))
    text, call, end = choices_of(sent)
    assert (text["delta"], text["finish_reason"]) == ({"content": "Hm."}, None)
    function = {"name": "f", "arguments": "{}"}
    assert call["delta"] == {
        "tool_calls": [{"index": 0, "id": "call-1", "type": "function", "function": function}]
    }
    assert (end["delta"], end["finish_reason"]) == ({}, "tool_calls")
    assert b'"system_fingerprint":"weights-3-4"' in sent


def test_an_answer_that_is_cut_off_ends_by_its_length_even_after_a_call() -> None:
    told = choice(pieces_of(CALL, "and", finish="length"), reader())
    assert (told["finish_reason"], len(told["message"]["tool_calls"])) == ("length", 1)


def test_without_parallel_calls_the_first_one_counts() -> None:
    told = choice(pieces_of(CALL, CALL), reader(parallel_calls=False))
    assert len(told["message"]["tool_calls"]) == 1
    assert len(choice(pieces_of(CALL, CALL), reader())["message"]["tool_calls"]) == 2


def test_tokens_whose_text_is_held_back_have_their_log_probabilities_at_once() -> None:
    token = TOKENIZER.encode("x")[0]
    entry, end = TokenEntry(token, -1.0, (), 0), TokenEntry(2, -1.0, (), 1, ends_text=True)
    events = encoder(reader(), with_logprobs=True)
    [held] = choices_of(events.piece(0, Piece("<tool", (entry,), None), None))
    assert held["delta"] == {"content": ""}
    assert held["logprobs"]["content"] == [
        {"token": "x", "logprob": -1.0, "bytes": [120], "top_logprobs": []}
    ]
    [rest, last] = choices_of(events.piece(0, Piece("", (end,), "stop"), None))
    assert rest["delta"] == {"content": "<tool"}
    assert rest["logprobs"]["content"] == []
    assert last["finish_reason"] == "stop"
