"""What a completion request may say, and how each mistake in it is named."""

import asyncio
import json
import random
from types import SimpleNamespace
from typing import Any

import pytest

from services.gateway.generation import GenerationRequest
from services.gateway.http.errors import ApiError
from services.gateway.openai.completions.request import CompletionRequest, parse_request
from services.gateway.openai.completions.route import generation_request
from services.gateway.settings import GatewaySettings
from services.gateway.text.tokenise import TokenisedPrompt
from shared.clock import IdSource
from shared.model_files import ModelCard
from tests.support.gateway import CARD, MODEL, TOKENIZER

SETTINGS = GatewaySettings()


def read(**fields: Any) -> CompletionRequest:
    return parse_request(json.dumps({"model": MODEL, "prompt": "hello"} | fields).encode())


def generation(request: CompletionRequest, card: ModelCard = CARD) -> GenerationRequest:
    ids = IdSource(random.Random(0))
    context = SimpleNamespace(card=card, tokenizer=TOKENIZER, settings=SETTINGS, ids=ids)
    return asyncio.run(generation_request(request, "cmpl-1", context))


def prepare(request: CompletionRequest, card: ModelCard = CARD) -> tuple[TokenisedPrompt, ...]:
    return generation(request, card).prompts


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 3}, "model"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": {}}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [[[1]]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [CARD.vocab_size]}, "prompt"),
        ({"prompt": [[1], [10**30]]}, "prompt"),
        ({"prompt": [1] * CARD.context_length}, "prompt"),
        ({"prompt": ["a"] * 33}, "prompt"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.0}, "max_tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": CARD.context_length}, "prompt"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": []}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 33}, "n"),
        ({"n": "2"}, "n"),
        ({"stop": ""}, "stop"),
        ({"stop": 1}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a", 1]}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": "a" * 257}, "stop"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": 1}, "echo"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": 1}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"other": True}}, "stream_options.other"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"presence_penalty": False}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"logit_bias": {"50256": -100}}, "logit_bias"),
        ({"user": "me"}, "user"),
        ({"messages": []}, "messages"),
        ({"top_k": 40}, "top_k"),
        ({"temprature": None}, "temprature"),
    ],
)
def test_mistake_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        prepare(read(**fields))
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize("missing", ["model", "prompt"])
def test_missing_parameter_is_named(missing: str) -> None:
    body = {"model": MODEL, "prompt": "x"}
    del body[missing]
    with pytest.raises(ApiError, match="required") as caught:
        parse_request(json.dumps(body).encode())
    assert (caught.value.status, caught.value.param) == (400, missing)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b'{"prompt":' + b"[" * 100_000 + b"}",
    ],
)
def test_body_that_is_no_json_object(body: bytes) -> None:
    with pytest.raises(ApiError, match="JSON") as caught:
        parse_request(body)
    assert caught.value.status == 400


def test_every_parameter_at_rest_is_accepted() -> None:
    nulls = {name: None for name in CompletionRequest.model_fields if name not in ("model", "prompt")} | {
        "best_of": None,
        "suffix": None,
        "logit_bias": None,
        "user": None,
    }
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "n": 2, "best_of": 2}
    assert read(**nulls) == read()
    assert read(**neutral) == read(n=2)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a b", ["a b"]),
        ([1, 2], [[1, 2]]),
        (["a", "b"], ["a", "b"]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ([[]], [[]]),
        ("", [""]),
    ],
)
def test_forms_of_a_prompt(prompt: object, expected: object) -> None:
    assert read(prompt=prompt).prompt == expected


def test_other_model_does_not_exist() -> None:
    with pytest.raises(ApiError) as caught:
        prepare(read(model="gpt-4"))
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")


def test_too_long_prompt_is_counted_for_the_client() -> None:
    with pytest.raises(ApiError, match=r"1024 tokens.*1025 tokens.*1009 in your prompt; 16 for") as caught:
        prepare(read(prompt=[1] * 1009))
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    assert len(prepare(read(prompt=[1] * 1008))[0].ids) == 1008


def test_very_long_text_is_counted_as_well() -> None:
    with pytest.raises(ApiError) as caught:
        prepare(read(prompt="word " * 20_000))
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("prompt", ["", [[]], [""]])
def test_empty_prompt_begins_with_the_models_own_token(prompt: object) -> None:
    [tokenised] = prepare(read(prompt=prompt))
    assert tokenised == TokenisedPrompt((CARD.bos_token_id or 0,), "")


def test_empty_prompt_needs_such_a_token() -> None:
    fields = {"name": MODEL, "model_type": "any", "vocab_size": 10, "context_length": 64}
    with_end = ModelCard(**fields, bos_token_id=None, eos_token_ids=(5, 6))  # type: ignore[arg-type]
    without = ModelCard(**fields, bos_token_id=None, eos_token_ids=())  # type: ignore[arg-type]
    assert prepare(read(prompt=""), with_end)[0].ids == (5,)
    with pytest.raises(ApiError, match="empty"):
        prepare(read(prompt=""), without)


def test_the_parameters_reach_the_generation() -> None:
    fields = {"n": 2, "seed": 5, "logprobs": 3, "echo": True, "temperature": 0.5, "top_p": 0.9, "stop": "x"}
    asked = generation(read(prompt=["a", "b"], **fields))
    sampling = asked.sampling
    assert (asked.num_choices, asked.echo, asked.stops, sampling.seed) == (2, True, ("x",), 5)
    assert (sampling.temperature, sampling.top_p, sampling.num_logprobs) == (0.5, 0.9, 3)
    assert (sampling.max_tokens, sampling.stop_token_ids) == (16, CARD.eos_token_ids)
