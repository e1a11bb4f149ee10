"""What a chat request may say, what it asks of the model, and how each mistake in it is named."""

import asyncio
import json
import random
from types import SimpleNamespace
from typing import Any

import pytest

from services.gateway.generation import GenerationRequest
from services.gateway.http.errors import ApiError
from services.gateway.openai.chat.prompt import generation_request
from services.gateway.openai.chat.request import ChatRequest
from services.gateway.settings import GatewaySettings
from services.gateway.text.threads import TextThreads
from shared.chat_template import ChatTemplate
from shared.clock import IdSource, SystemClock
from shared.structured_output import JSON_OBJECT_SCHEMA, grammar_of
from tests.support import requests
from tests.support.chat_templates import CHATML
from tests.support.gateway import CARD, MODEL, TOKENIZER

HELLO: dict[str, Any] = {"role": "user", "content": "hello"}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
STRICT_TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "strict": True}}
NAMED: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
SCHEMA: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "integer"}}}


def read(**fields: Any) -> ChatRequest:
    return requests.read(ChatRequest, {"model": MODEL, "messages": [HELLO]} | fields)


def generation(source: str | None = CHATML, **fields: Any) -> GenerationRequest:
    template = ChatTemplate({"default": source}, {}, SystemClock()) if source else None
    ids, settings = IdSource(random.Random(0)), GatewaySettings()
    context = SimpleNamespace(
        card=CARD,
        tokenizer=TOKENIZER,
        text_threads=TextThreads(1),
        settings=settings,
        ids=ids,
        chat_template=template,
    )
    return asyncio.run(generation_request(read(**fields), "chatcmpl-1", "interactive", context))


def prompt_of(**fields: Any) -> str:
    return generation(**fields).prompts[0].text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 3}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages.0"),
        ({"messages": [HELLO, {"role": "king", "content": "x"}]}, "messages.1"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content"),
        ({"messages": [HELLO | {"colour": "red"}]}, "messages.0.colour"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0"),
        ({"messages": [{"role": "tool", "content": "4"}]}, "messages.0.tool_call_id"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 5, "max_tokens": 6}, "max_completion_tokens"),
        ({"max_tokens": CARD.context_length}, "messages"),
        ({"n": 33}, "n"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": SCHEMA, "ignore_eos": True}, "ignore_eos"),
        ({"response_format": SCHEMA, "min_tokens": 1}, "min_tokens"),
        ({"response_format": SCHEMA, "tools": [TOOL]}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"not": {}}}}},
            "response_format",
        ),
        ({"tools": [{"type": "retrieval"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [STRICT_TOOL], "ignore_eos": True}, "ignore_eos"),
        ({"tools": [TOOL, TOOL]}, "tools.1.function.name"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]}, "tool_choice"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"prompt": "x"}, "prompt"),
        ({"store": "yes"}, "store"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"verbosity": "low"}, "verbosity"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"modalities": ["audio"]}, "modalities.0"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"chat_template": "x"}, "chat_template"),
        ({"chat_template_kwargs": ["enable_thinking"]}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {str(number): 1 for number in range(65)}}, "chat_template_kwargs"),
        *(
            ({"chat_template_kwargs": {name: "x"}}, "chat_template_kwargs")
            for name in ("messages", "tools", "add_generation_prompt", "bos_token", "chat_template")
        ),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"metadata": {"a": 1}}, "metadata.a"),
    ],
)
def test_mistake_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        generation(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_an_image_is_refused_by_its_name() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:"}}
    with pytest.raises(ApiError, match="image_url"):
        read(messages=[{"role": "user", "content": [part]}])


@pytest.mark.parametrize(
    "fields",
    [
        {name: None for name in ChatRequest.model_fields if name not in ("model", "messages")},
        {"user": "u1", "safety_identifier": "x", "prompt_cache_key": "y", "metadata": {"a": "b"}},
        {"store": False, "service_tier": "auto"},
        {"stop": "", "ignore_eos": False, "top_k": -1, "min_p": 0, "repetition_penalty": 1.0},
        {"stream_options": {"include_usage": True}},
        {"logprobs": False},
        {"response_format": {"type": "text"}},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
        {"tools": [], "tool_choice": "auto"},
        {"tools": [TOOL], "tool_choice": "none"},
        {"modalities": ["text"], "prediction": None, "reasoning_effort": "none", "verbosity": "medium"},
        {"functions": [], "function_call": "auto", "audio": None},
        {"add_generation_prompt": True, "continue_final_message": False, "chat_template_kwargs": {}},
    ],
)
def test_what_changes_nothing_passes(fields: dict[str, Any]) -> None:
    room = CARD.context_length - len(generation().prompts[0].ids)
    expected = generation(max_tokens=904) if fields.get("max_tokens") else generation()
    assert generation().sampling.max_tokens == room
    assert generation(**fields) == expected


def test_a_model_without_a_template_says_what_to_do() -> None:
    with pytest.raises(ApiError, match="LEMIX_CHAT_TEMPLATE") as caught:
        generation(source=None)
    assert caught.value.status == 400


def test_a_refusal_of_the_template_is_told() -> None:
    with pytest.raises(ApiError, match="no system messages") as caught:
        generation(source="{{ raise_exception('no system messages') }}")
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_a_conversation_is_rendered_without_the_tokenizers_own_special_tokens() -> None:
    asked = generation(source="{{ messages[0].content }}", messages=[HELLO | {"content": "one two"}])
    assert asked.prompts[0].ids == tuple(TOKENIZER.encode_part("one two"))


def test_parts_of_text_are_joined_and_developers_are_the_system() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    text = prompt_of(messages=[{"role": "developer", "content": parts}, HELLO])
    assert text.startswith("<|im_start|>system\none\ntwo<|im_end|>\n<|im_start|>user\nhello<|im_end|>")
    assert text.endswith("<|im_start|>assistant\n")


SHOW = "{{ messages | tojson }}{{ tools | tojson }}"


def test_calls_and_answers_of_tools_reach_the_template() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []}
    result = {"role": "tool", "tool_call_id": "c1", "content": "4"}
    text = prompt_of(source=SHOW, messages=[HELLO, answer, result])
    shown, end = json.JSONDecoder().raw_decode(text)
    decoded = call | {"function": {"name": "f", "arguments": {"a": 1}}}
    assert shown[1:] == [{"role": "assistant", "tool_calls": [decoded]}, result]
    assert text[end:] == "null"


def test_what_clients_add_to_an_answer_is_not_shown_to_the_template() -> None:
    """The official client adds it when it puts a stream together or parses an answer."""
    function = {"name": "f", "arguments": "{}"}
    call = {"id": "c1", "type": "function", "function": function}
    answer = {"role": "assistant", "content": "one", "tool_calls": [call]}
    parsed = {"index": 0, "function": function | {"parsed_arguments": {"a": 1}}}
    added = answer | {"parsed": {"b": 2}, "tool_calls": [call | parsed]}
    assert prompt_of(source=SHOW, messages=[added]) == prompt_of(source=SHOW, messages=[answer])


def test_variables_reach_the_template() -> None:
    source = "{{ 'thinking' if enable_thinking else 'at once' }}"
    assert prompt_of(source=source) == "at once"
    assert prompt_of(source=source, chat_template_kwargs={"enable_thinking": True}) == "thinking"


def test_tools_reach_the_template_as_they_are() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "x": None}}}
    text = prompt_of(source=SHOW, tools=[tool])
    assert text.endswith(json.dumps([tool]))
    assert prompt_of(source=SHOW, tools=[tool], tool_choice="none").endswith("null")


def test_a_refusal_of_an_earlier_answer_is_its_text() -> None:
    answer = {"role": "assistant", "content": None, "refusal": "No."}
    assert "assistant\nNo.<" in prompt_of(messages=[HELLO, answer, HELLO])


@pytest.mark.parametrize(
    ("fields", "schema"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, json.loads(JSON_OBJECT_SCHEMA)),
        ({"response_format": SCHEMA}, {"type": "integer"}),
        ({"response_format": SCHEMA, "tools": [TOOL], "tool_choice": "none"}, {"type": "integer"}),
        ({"tools": [TOOL]}, None),
    ],
)
def test_the_schema_of_the_answer(fields: dict[str, Any], schema: object) -> None:
    grammar = None if schema is None else grammar_of(json.dumps(schema))
    assert generation(**fields).sampling.grammar == grammar


def test_log_probabilities_are_counted() -> None:
    assert generation(logprobs=True).sampling.num_logprobs == 0
    assert generation(logprobs=True, top_logprobs=20).sampling.num_logprobs == 20
    assert generation().sampling.num_logprobs is None
