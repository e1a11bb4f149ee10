"""A request that is wrong in very many places is told of one of them, and looked at no further."""

from typing import Any

import pytest
from pydantic import ValidationError

from services.gateway.jobs.requests import JobRequest
from services.gateway.openai.chat.request import ChatRequest
from services.gateway.openai.completions.request import CompletionRequest
from services.gateway.openai.responses.request import ResponseRequest
from services.gateway.openai.schema import RequestModel
from services.gateway.openai.tokens import DetokenizeRequest, TokenizeRequest

HELLO: dict[str, Any] = {"role": "user", "content": "hello"}
MANY = 3000
UNKNOWN = {f"x{place}": 0 for place in range(MANY)}


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (ChatRequest, {"messages": [0] * MANY}),
        (ChatRequest, {"messages": [HELLO] * MANY}),
        (ChatRequest, {"messages": [HELLO], **UNKNOWN}),
        (ChatRequest, {"messages": [HELLO | UNKNOWN]}),
        (ChatRequest, {"messages": [{"role": "assistant", "tool_calls": [0] * MANY}]}),
        (ChatRequest, {"messages": [HELLO], "logit_bias": dict.fromkeys(UNKNOWN, "y")}),
        (ChatRequest, {"messages": [HELLO], "metadata": UNKNOWN}),
        (CompletionRequest, {"prompt": ["x"] * MANY}),
        (ResponseRequest, {"input": [0] * MANY}),
        (ResponseRequest, {"input": [HELLO] * MANY}),
        (ResponseRequest, {"input": [HELLO | {"content": [0] * MANY}]}),
        (ResponseRequest, {"input": "x", "include": ["x"] * MANY}),
        (JobRequest, {"training_file": "f", "metadata": UNKNOWN}),
        (TokenizeRequest, {"messages": [0] * MANY}),
        (DetokenizeRequest, {"tokens": ["x"] * MANY}),
    ],
)
def test_one_fault_is_enough(model: type[RequestModel], fields: dict[str, Any]) -> None:
    named = {"model": "m", **fields}
    with pytest.raises(ValidationError) as caught:
        model.model_validate(named)
    assert caught.value.error_count() == 1
