"""A model that is asked about the weather: it calls a tool, reads its answer, tells it in words or JSON."""

import json
from typing import Any

from pydantic import BaseModel

from shared.messages.inference import InferenceTask, SequenceResult
from tests.support.gateway import TOKENIZER, says, schema_of

QUESTION = "How warm is it in Paris?"
IN_WORDS = "It is 21 degrees in Paris."
ARGUMENTS = {"city": "Paris"}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class Report(BaseModel):
    """The weather in a city."""

    city: str
    degrees: int


REPORT = Report(city="Paris", degrees=21)


def weather(city: str) -> str:
    """The weather of a city."""
    return json.dumps({"city": city, "degrees": 21})


def script(task: InferenceTask) -> list[SequenceResult]:
    """What the model says; it sees no more than its prompt and the schema that it is held to."""
    return says(_answer(TOKENIZER.decode(task.prompt), schema_of(task)))(task)


def _answer(prompt: str, schema: dict[str, Any] | None) -> str:
    if schema is not None:
        called = schema.get("properties", {}).get("name", {}).get("const")
        return REPORT.model_dump_json() if called is None else _call(called)
    if "<tool_response>" in prompt:
        assert weather(**ARGUMENTS) in prompt, "the model reads what the tool has said"
        return IN_WORDS
    return f"<tool_call>\n{_call('weather')}\n</tool_call>" if "<tools>" in prompt else IN_WORDS


def _call(function: str) -> str:
    arguments = ARGUMENTS if function == "weather" else REPORT.model_dump()
    return json.dumps({"name": function, "arguments": arguments})
