"""Items of the Responses API as messages of a chat, and what is refused by name."""

from typing import Any

import pytest

from services.gateway.http.errors import ApiError
from services.gateway.openai.responses.items import chat_messages
from services.gateway.openai.responses.request import ResponseRequest
from tests.support.requests import read


def request(**fields: Any) -> ResponseRequest:
    return read(ResponseRequest, {"model": "m", "input": "Hi", **fields})


def messages(items: Any, instructions: str | None = None) -> list[dict[str, Any]]:
    return chat_messages(request(input=items).input, instructions)


def text(*parts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": part} for part in parts]


def test_a_text_is_what_the_user_says() -> None:
    assert messages("Hi") == [{"role": "user", "content": text("Hi")}]


def test_instructions_come_first() -> None:
    assert messages("Hi", "Be brief.")[0] == {"role": "system", "content": "Be brief."}


def test_parts_stay_parts() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]

    assert messages([{"role": "user", "content": parts}]) == [{"role": "user", "content": text("a", "b")}]


def test_an_earlier_answer_with_calls_is_one_message() -> None:
    answer = {
        "type": "message",
        "id": "msg-1",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": "Let me see.", "annotations": [], "logprobs": []}],
    }
    calls = [
        {"type": "function_call", "id": "fc-1", "call_id": f"call-{n}", "name": "now", "arguments": "{}"}
        for n in (1, 2)
    ]
    results = [
        {"type": "function_call_output", "call_id": "call-1", "output": "noon"},
        {
            "type": "function_call_output",
            "call_id": "call-2",
            "output": [{"type": "input_text", "text": "night"}],
        },
    ]

    assert messages([{"role": "user", "content": "Time?"}, answer, *calls, *results]) == [
        {"role": "user", "content": text("Time?")},
        {
            "role": "assistant",
            "content": text("Let me see."),
            "tool_calls": [
                {"id": f"call-{n}", "type": "function", "function": {"name": "now", "arguments": "{}"}}
                for n in (1, 2)
            ],
        },
        {"role": "tool", "tool_call_id": "call-1", "content": text("noon")},
        {"role": "tool", "tool_call_id": "call-2", "content": text("night")},
    ]


IMAGE = {"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp-1"}, "previous_response_id"),
        ({"conversation": "conv-1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"background": True}, "background"),
        ({"store": "yes"}, "store"),
        ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"include": ["everything"]}, "include.0"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": [{"role": "user", "content": []}]}, "input.0.content"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": []}]}, "input.0.output"),
        ({"temperature": 3}, "temperature"),
        ({"n": 2}, "n"),
        ({"input": []}, "input"),
        ({"input": [IMAGE]}, "input.0.content.0.type"),
        ({"input": [{"type": "item_reference", "id": "msg-1"}]}, "input.0"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as raised:
        request(**fields)
    assert (raised.value.status, raised.value.param) == (400, param)


@pytest.mark.parametrize(
    "fields",
    [
        {"previous_response_id": None, "conversation": None, "instructions": None},
        {"store": False, "background": False, "truncation": "disabled", "service_tier": "auto"},
        {"reasoning": {}, "include": ["reasoning.encrypted_content"]},
        {"metadata": {"a": "b"}, "user": "u1", "safety_identifier": "s", "prompt_cache_key": "k"},
        {"text": {"format": {"type": "text"}, "verbosity": "medium"}},
        {"max_output_tokens": 16.0, "max_tool_calls": 3, "stream_options": {"include_obfuscation": False}},
    ],
)
def test_what_changes_nothing_passes(fields: dict[str, Any]) -> None:
    request(**fields)
