"""An answer as it is remembered, and the lessons that a correction of it makes. Pure."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import to_json

from shared.documents import Document

Json = dict[str, Any]
LessonKind = Literal["example", "preference"]


class StoredAnswer(Document):
    """All that is kept of a request and its answer."""

    id: str
    key_id: str
    """The API key that asked; empty: there were no keys."""
    created_at: int
    """Seconds since the Unix epoch."""
    model: str
    versions: tuple[int, int] = (0, 0)
    """The weights that made the first and the last token."""
    messages: tuple[Json, ...] = ()
    """The conversation before the answer, as training examples have it; empty: it continues prompts."""
    tools: tuple[Json, ...] = ()
    prompts: tuple[str, ...] = ()
    """The text that each choice continues, where that is asked."""
    choices: tuple[Json, ...] = ()
    """Each choice as a message of the assistant."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """Something to be learnt from one correction."""

    kind: LessonKind
    line: bytes
    """A training example, as JSON."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.line).hexdigest()


def lessons_of(answer: StoredAnswer, choice: int, correction: Mapping[str, Any]) -> list[Lesson]:
    """The lessons where `correction` should have been said: that alone is learnt, nothing said before it.

    First the example. In conversations the pair of the correction and the answer follows, a preference.
    """
    return [Lesson(kind, to_json(content)) for kind, content in _contents(answer, choice, correction)]


def _contents(
    answer: StoredAnswer, choice: int, correction: Mapping[str, Any]
) -> Iterator[tuple[LessonKind, Json]]:
    if not answer.messages:
        yield "example", {"prompt": answer.prompts[choice], "completion": correction["content"]}
        return
    tools = {"tools": list(answer.tools)} if answer.tools else {}
    before = [_not_learnt(message) for message in answer.messages]
    yield "example", {"messages": [*before, dict(correction)], **tools}
    yield (
        "preference",
        {
            "input": {"messages": list(answer.messages), **tools},
            "preferred_output": [dict(correction)],
            "non_preferred_output": [answer.choices[choice]],
        },
    )


def _not_learnt(message: Json) -> Json:
    return message | {"weight": 0} if message["role"] == "assistant" else message


def feedback_id_of(
    answer_id: str, choice: int, correction: Mapping[str, Any] | None, score: float | None
) -> str:
    """The id of a feedback: the same one for the same content, so that it counts once."""
    content = [answer_id, choice, correction and sorted(correction.items()), score]
    return f"fb-{hashlib.sha256(to_json(content)).hexdigest()[:32]}"


TRAINED_FIELDS = ("role", "content", "reasoning_content", "name", "tool_calls", "tool_call_id")
"""Fields of a message that training examples have."""


def as_trained(messages: Sequence[Mapping[str, Any]]) -> tuple[Json, ...]:
    """Messages for a chat template as those of a training example."""
    return tuple(_as_trained(message) for message in messages)


def _as_trained(message: Mapping[str, Any]) -> Json:
    fields = {name: message[name] for name in TRAINED_FIELDS if message.get(name) is not None}
    if "tool_calls" in fields:
        fields.setdefault("content", None)  # templates look for it
    if "reasoning_content" not in fields and message.get("reasoning") is not None:
        fields["reasoning_content"] = message["reasoning"]
    return fields
