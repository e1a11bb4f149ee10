"""What a completion request may say, and how each mistake in it is named."""

import asyncio
import random
from types import SimpleNamespace
from typing import Any

import pytest

from services.gateway.generation import GenerationRequest
from services.gateway.http.errors import ApiError
from services.gateway.openai.completions.request import CompletionRequest
from services.gateway.openai.completions.route import generation_request
from services.gateway.settings import GatewaySettings
from services.gateway.text.threads import TextThreads
from services.gateway.text.tokenise import TokenisedPrompt
from shared.clock import IdSource
from shared.model_files import ModelCard
from tests.support import requests
from tests.support.gateway import CARD, MODEL, TOKENIZER

SETTINGS = GatewaySettings()


def read(**fields: Any) -> CompletionRequest:
    return requests.read(CompletionRequest, {"model": MODEL, "prompt": "hello"} | fields)


def generation(request: CompletionRequest, card: ModelCard = CARD) -> GenerationRequest:
    ids = IdSource(random.Random(0))
    context = SimpleNamespace(
        card=card, tokenizer=TOKENIZER, text_threads=TextThreads(1), settings=SETTINGS, ids=ids
    )
    return asyncio.run(generation_request(request, "cmpl-1", "interactive", context))


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
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": float("inf")}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
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
        ({"stop": 1}, "stop"),
        ({"stop": ["a", 1]}, "stop.1"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "a" * 257}, "stop"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": 1}, "echo"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "stream_options": 1}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"other": True}}, "stream_options.other"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"presence_penalty": -2.1}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"five": 1}}, "logit_bias.five"),
        ({"logit_bias": {str(CARD.vocab_size): 1}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(301)}}, "logit_bias"),
        ({"stop_token_ids": [CARD.vocab_size]}, "stop_token_ids"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"presence_penalty": False}, "presence_penalty"),
        ({"messages": []}, "messages"),
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
        requests.read(CompletionRequest, body)
    assert (caught.value.status, caught.value.param) == (400, missing)


@pytest.mark.parametrize(
    "fields",
    [
        {name: None for name in CompletionRequest.model_fields if name not in ("model", "prompt")},
        {"max_tokens": 16.0},
        {"max_completion_tokens": 16},
        {"max_tokens": 16, "max_completion_tokens": 16},
        {"stop": ""},
        {"stop": [""]},
        {"stop": []},
        {"suffix": ""},
        {"best_of": 1},
        {"logprobs": False},
        {"ignore_eos": False},
        {"top_k": -1},
        {"top_k": 0},
        {"min_p": 0},
        {"repetition_penalty": 1.0},
        {"presence_penalty": 0, "frequency_penalty": 0.0},
        {"logit_bias": {}},
        {"user": "u1"},
        {"metadata": {"run": "7"}},
        {"store": False},
        {"service_tier": "auto"},
        {"stream_options": {}},
        {"stream_options": {"include_usage": True, "include_obfuscation": True}},
        {"use_beam_search": False, "length_penalty": 1.0, "skip_special_tokens": True},
    ],
)
def test_what_changes_nothing_passes(fields: dict[str, Any]) -> None:
    assert generation(read(**fields)) == generation(read())


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
    fields = {"n": 2, "seed": 5, "logprobs": 3, "echo": True, "temperature": 0.5, "top_p": 0.9}
    asked = generation(read(prompt=["a", "b"], stop="x", **fields))
    sampling = asked.sampling
    assert (asked.num_choices, asked.echo, asked.stops, sampling.seed) == (2, True, ("x",), 5)
    assert (sampling.temperature, sampling.top_p, sampling.num_logprobs) == (0.5, 0.9, 3)
    assert (sampling.max_tokens, sampling.stop_token_ids) == (16, CARD.eos_token_ids)


def test_the_ways_to_draw_reach_the_generation() -> None:
    same = {
        "top_k": 40,
        "min_p": 0.1,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "repetition_penalty": 1.2,
        "min_tokens": 3,
    }
    told = generation(read(logit_bias={"5": -100, "6": 1.5}, stop_token_ids=[9], **same)).sampling
    assert {name: getattr(told, name) for name in same} == same
    assert told.logit_bias == ((5, -100.0), (6, 1.5))
    assert told.stop_token_ids == (*CARD.eos_token_ids, 9)
    assert generation(read(ignore_eos=True)).sampling.stop_token_ids == ()


def test_the_range_of_a_number_is_told() -> None:
    with pytest.raises(ApiError, match="less than or equal to 9223372036854775807"):
        read(seed=2**63)
    with pytest.raises(ApiError, match="greater than 0"):
        read(top_p=0)
