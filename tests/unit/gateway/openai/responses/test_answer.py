"""A response and the events that tell of it, against the official client's own types."""

import json
from itertools import count
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from services.gateway.generation import Usage, Versions
from services.gateway.http.errors import ApiError
from services.gateway.openai.chat.answer import ChoiceReader
from services.gateway.openai.responses.answer import ResponseEvents, ResponseObject
from services.gateway.openai.tool_calls import ToolCallParser
from services.gateway.text.detokenise import Piece, TokenEntry

EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
CALL = '<tool_call>{"name": "now", "arguments": {"zone": "UTC"}}</tool_call>'


def events_of(*, with_tools: bool = False) -> ResponseEvents:
    numbers = count(1)
    response = ResponseObject(
        id="resp-1",
        created_at=5,
        model="m",
        instructions=None,
        max_output_tokens=9,
        metadata={},
        parallel_tool_calls=True,
        service_tier="default",
        store=False,
        temperature=1.0,
        text={"format": {"type": "text"}},
        tool_choice="auto",
        tools=[],
        top_logprobs=0,
        top_p=1.0,
    )
    return ResponseEvents(
        response,
        lambda prefix: f"{prefix}-{next(numbers)}",
        reader=ChoiceReader(ToolCallParser(lambda: "call-1") if with_tools else None, parallel_calls=True),
        logprobs_of=lambda entries: [
            {"token": str(entry.token), "bytes": [], "logprob": entry.logprob, "top_logprobs": []}
            for entry in entries
        ],
    )


def told(body: bytes) -> list[dict[str, Any]]:
    """The events in a stream's body; each is one that the client knows, and named alike in both places."""
    events = []
    for block in body.decode().split("\n\n")[:-1]:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert EVENTS.validate_python(event).to_dict(exclude_unset=True) == event
        events.append(event)
    return events


def run(events: ResponseEvents, *texts: str, finish: str = "stop") -> list[dict[str, Any]]:
    body = events.opening(None)
    for text in texts:
        body += events.piece(0, Piece(text, (), None), None)
    body += events.piece(0, Piece("", (), finish), None) + events.ending(Versions(3, 5), Usage(3, 4))
    return told(body)


def test_a_text_is_told_in_openais_order() -> None:
    events = run(events_of(), "Hel", "lo")

    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    response = Response.model_validate(events[-1]["response"])
    assert (response.output_text, response.status) == ("Hello", "completed")
    assert events[-1]["response"]["system_fingerprint"] == "weights-3-5"
    usage = response.usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (3, 4, 7)


def test_a_response_that_is_in_progress_is_empty() -> None:
    created, in_progress, *_ = run(events_of(), "Hello")

    for event in (created, in_progress):
        assert (event["response"]["status"], event["response"]["output"]) == ("in_progress", [])


def test_an_answer_that_reached_its_limit_is_incomplete() -> None:
    *_, item, last = run(events_of(), "Hel", finish="length")

    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert item["item"]["status"] == last["response"]["output"][0]["status"] == "incomplete"


def test_an_empty_answer_has_a_message_all_the_same() -> None:
    last = run(events_of())[-1]

    assert Response.model_validate(last["response"]).output_text == ""
    assert last["response"]["output"][0]["content"][0]["text"] == ""


@pytest.mark.parametrize("piece_length", [1, 7, 1000])
def test_calls_are_items_of_their_own(piece_length: int) -> None:
    text = f"Let me see.\n{CALL}\n{CALL}"
    pieces = [text[start : start + piece_length] for start in range(0, len(text), piece_length)]

    events = run(events_of(with_tools=True), *pieces)

    output: Any = Response.model_validate(events[-1]["response"]).output
    message, *calls = output
    assert message.content[0].text == "Let me see."
    assert [(call.name, call.arguments, call.call_id) for call in calls] == [
        ("now", '{"zone": "UTC"}', "call-1")
    ] * 2
    arguments = [event for event in events if "function_call_arguments" in event["type"]]
    assert [(event["output_index"], event["item_id"]) for event in arguments] == [
        (index + 1, call.id) for index, call in enumerate(calls) for _ in range(2)
    ]
    done = [event for event in events if event["type"] == "response.output_item.done"]
    assert [event["output_index"] for event in done] == [0, 1, 2]


def test_log_probabilities_come_with_the_text_that_they_belong_to() -> None:
    events = events_of()
    body = events.opening(None) + events.piece(0, Piece("", (TokenEntry(1, -1.0, (), 0),), None), None)
    body += events.piece(0, Piece("é", (TokenEntry(2, -2.0, (), 0),), "stop"), None)
    body += events.ending(None, Usage(1, 2))

    deltas = [event for event in told(body) if event["type"] == "response.output_text.delta"]

    assert [[entry["token"] for entry in event["logprobs"]] for event in deltas] == [["1", "2"]]
    part: Any = events.response.output[0].content[0]
    assert [entry["logprob"] for entry in part.logprobs] == [-1.0, -2.0]


def test_an_error_ends_the_stream_as_failed() -> None:
    events = events_of()
    events.opening(None)
    [event] = told(events.failure(ApiError(503, "the node is gone")))

    assert event["type"] == "response.failed"
    assert event["response"]["error"] == {"code": "server_error", "message": "the node is gone"}
