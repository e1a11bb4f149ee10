"""Requests as the OpenAPI document describes them, against what the models take."""

from typing import Any

import pytest
from jsonschema import Draft202012Validator

from services.gateway.http.errors import ApiError
from services.gateway.jobs.requests import JobRequest
from services.gateway.openai.chat.request import ChatRequest
from services.gateway.openai.completions.request import CompletionRequest
from services.gateway.openai.responses.request import ResponseRequest
from services.gateway.openai.schema import RequestModel
from tests.support.requests import read

HELLO: dict[str, Any] = {"role": "user", "content": "hello"}
LEAST: dict[type[RequestModel], dict[str, Any]] = {
    ChatRequest: {"model": "m", "messages": [HELLO]},
    CompletionRequest: {"model": "m", "prompt": "x"},
    ResponseRequest: {"model": "m", "input": "x"},
    JobRequest: {"model": "m", "training_file": "f"},
}


@pytest.mark.parametrize("model", list(LEAST), ids=lambda model: model.__name__)
def test_null_is_the_same_as_not_given(model: type[RequestModel]) -> None:
    nulls = {name: None for name in model.model_fields if name not in LEAST[model]}
    assert read(model, LEAST[model] | nulls) == read(model, LEAST[model])
    assert Draft202012Validator(model.model_json_schema()).is_valid(LEAST[model] | nulls)


@pytest.mark.parametrize(
    ("model", "fields", "is_right"),
    [
        (CompletionRequest, {"prompt": ["a"]}, True),
        (CompletionRequest, {"prompt": [1]}, True),
        (CompletionRequest, {"prompt": [[1]]}, True),
        (CompletionRequest, {"prompt": []}, False),
        (CompletionRequest, {"max_tokens": 16.0}, True),
        (CompletionRequest, {"max_tokens": -1}, False),
        (CompletionRequest, {"logprobs": 6}, False),
        (CompletionRequest, {"seed": 2**80}, False),
        (CompletionRequest, {"stop": "x"}, True),
        (CompletionRequest, {"stop": ["x"] * 16}, True),
        (CompletionRequest, {"stop": ["x"] * 17}, False),
        (CompletionRequest, {"logit_bias": {"5": 1}}, True),
        (CompletionRequest, {"logit_bias": {"x": 1}}, False),
        (CompletionRequest, {"priority": 1}, False),
        (CompletionRequest, {"colour": "red"}, False),
        (ChatRequest, {"max_tokens": 0}, False),
        (ChatRequest, {"tool_choice": "auto"}, True),
        (ChatRequest, {"tool_choice": {"type": "function", "function": {"name": "f"}}}, True),
        (ChatRequest, {"tool_choice": "maybe"}, False),
        (ChatRequest, {"chat_template_kwargs": {"enable_thinking": False}}, True),
        (ChatRequest, {"chat_template_kwargs": {"tools": []}}, False),
        (ChatRequest, {"messages": [HELLO | {"content": [{"type": "text", "text": "x"}]}]}, True),
        (ChatRequest, {"messages": [HELLO | {"content": [{"type": "image_url"}]}]}, False),
        (ChatRequest, {"messages": [{"role": "king", "content": "x"}]}, False),
        (ResponseRequest, {"input": [HELLO]}, True),
        (ResponseRequest, {"input": [HELLO | {"content": [{"type": "input_text", "text": "x"}]}]}, True),
        (ResponseRequest, {"input": [{"type": "item_reference", "id": "x"}]}, False),
        (ResponseRequest, {"input": []}, False),
        (ResponseRequest, {"max_output_tokens": 16.0}, True),
        (ResponseRequest, {"max_output_tokens": 0}, False),
        (ResponseRequest, {"top_logprobs": 21}, False),
        (ResponseRequest, {"tools": [{"type": "function", "name": "f"}]}, True),
        (ResponseRequest, {"tools": [{"type": "web_search"}]}, False),
        (ResponseRequest, {"tool_choice": {"type": "function", "name": "f"}}, True),
        (ResponseRequest, {"tool_choice": "maybe"}, False),
        (ResponseRequest, {"text": {"format": {"type": "json_schema", "name": "f", "schema": {}}}}, True),
        (ResponseRequest, {"text": {"format": {"type": "json_schema"}}}, False),
        (ResponseRequest, {"previous_response_id": "x"}, False),
        (ResponseRequest, {"store": "yes"}, False),
        (JobRequest, {"hyperparameters": {"n_epochs": "auto"}}, True),
        (JobRequest, {"hyperparameters": {"n_epochs": 51}}, False),
    ],
)
def test_the_document_and_the_model_agree(
    model: type[RequestModel], fields: dict[str, Any], is_right: bool
) -> None:
    body = LEAST[model] | fields
    assert Draft202012Validator(model.model_json_schema()).is_valid(body) == is_right
    if is_right:
        read(model, body)
    else:
        with pytest.raises(ApiError):
            read(model, body)
