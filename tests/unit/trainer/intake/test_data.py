"""Bodies of training batches: both formats, and every reason to refuse one."""

import json
import re
from typing import Any

import msgpack
import pytest

from services.trainer.intake.data import read_body
from shared.errors import InvalidBatchError
from shared.examples import (
    MAX_EXAMPLES,
    ChatMessage,
    Conversation,
    PlainText,
    Preference,
    PromptCompletion,
    TokenIds,
)

EXAMPLES = [
    {"prompt": "2+2=", "completion": "4"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    {"text": "once"},
    {"token_ids": [1, 2]},
]


def to_json(body: object) -> bytes:
    return json.dumps(body).encode()


@pytest.mark.parametrize("pack", [to_json, msgpack.packb])
def test_both_formats_give_the_same_examples(pack) -> None:
    body = read_body(pack({"id": "b-1", "examples": EXAMPLES}))

    assert body.id == "b-1"
    assert body.examples == [
        PromptCompletion(prompt="2+2=", completion="4"),
        Conversation(
            messages=[ChatMessage(role="user", content="hi"), ChatMessage(role="assistant", content="ho")]
        ),
        PlainText(text="once"),
        TokenIds(token_ids=[1, 2]),
    ]


def test_the_id_may_be_left_out_and_json_may_begin_with_space() -> None:
    assert read_body(b'\n {"examples": [{"text": "a"}]}').id is None


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "neither a JSON object nor a MessagePack map"),
        (b"[1, 2]", "neither a JSON object nor a MessagePack map"),
        (b"\xff\x00", "neither a JSON object nor a MessagePack map"),
        (b'{"examples": [', "the body: Invalid JSON"),
        (b"\x82\xa1", "the body is not MessagePack"),
        (msgpack.packb({"examples": [{"text": "a"}]}) + b"\x00", "the body is not MessagePack"),
        (msgpack.packb({1: 2}), "the body is not MessagePack"),
        (b"{}", "examples: Field required"),
        (b'{"examples": []}', "examples: List should have at least 1 item"),
        (b'{"examples": [{"text": "a"}], "lr": 1}', "lr: Extra inputs are not permitted"),
        (b'{"examples": [{"text": "a"}], "learning_rate_multiplier": 0}', "learning_rate_multiplier: "),
        (
            b'{"examples": [{"text": "a"}], "learning_rate_multiplier": 1e7}',
            "learning_rate_multiplier: ",
        ),
        (
            b'{"examples": [{"text": "a"}], "learning_rate_multiplier": NaN}',
            "learning_rate_multiplier: ",
        ),
        (b'{"examples": [{"text": "a"}], "id": ""}', "id: String should have at least 1 character"),
        (b'{"examples": [{"text": "a"}], "id": 5}', "id: Input should be a valid string"),
        (b'{"examples": ["a"]}', "examples.0: has none of the keys"),
        (b'{"examples": [{"completion": "a"}]}', "examples.0.prompt: Field required"),
        (b'{"examples": [{"text": "a", "token_ids": [1]}]}', "examples.0.token_ids: Extra inputs"),
        (b'{"examples": [{"token_ids": [1, "2"]}]}', "examples.0.token_ids.1: Input should be a valid int"),
        (b'{"examples": [{"token_ids": [1, 2.0]}]}', "examples.0.token_ids.1: Input should be a valid int"),
        (b'{"examples": [{"token_ids": [true, 2]}]}', "examples.0.token_ids.0: Input should be a valid int"),
        (b'{"examples": [{"messages": []}]}', "examples.0.messages: List should have at least 1 item"),
        (
            b'{"examples": [{"messages": [{"role": "user"}]}]}',
            "examples.0.messages.0: has neither content nor",
        ),
        (
            b'{"examples": [{"text": "a"}], "beta": 0.1}',
            "beta is for preferences, and these examples are none",
        ),
        (
            b'{"examples": [{"text": "a"}], "producer": "%b"}' % (b"x" * 129),
            "producer: String should have at most 128 characters",
        ),
        (
            to_json({"examples": [{"text": "a"}] * 2, "sources": [{"id": "1", "sha256": "0" * 64}]}),
            "the body: sources: 1 for 2 examples",
        ),
        (
            b'{"examples": [{"text": "a"}], "sources": [{"id": "1", "sha256": "0"}]}',
            "sources.0.sha256: String should match pattern",
        ),
        (msgpack.packb({"examples": [{"text": b"a"}]}), "examples.0.text: Input should be a valid str"),
        (
            json.dumps({"examples": [{"text": "a"}] * (MAX_EXAMPLES + 1)}).encode(),
            f"examples: List should have at most {MAX_EXAMPLES} items",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_place_and_the_fault(body: bytes, reason: str) -> None:
    with pytest.raises(InvalidBatchError) as refusal:
        read_body(body)

    assert reason in str(refusal.value)


def test_messages_may_be_as_in_the_files_of_openai() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    example = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
            {"role": "tool", "tool_call_id": "c", "content": "4"},
            {"role": "assistant", "content": "4", "weight": 1},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "parallel_tool_calls": False,
    }
    (read,) = read_body(to_json({"examples": [example]})).examples
    assert isinstance(read, Conversation)
    assert read.messages[0].content == "2+2?"
    assert [message.is_learnt for message in read.messages] == [False, False, False, True]


USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            USER | {"content": [{"type": "image_url"}]},
            "0.content: a content part of type 'image_url'",
        ),
        (
            USER | {"content": [{"type": "text"}]},
            "0.content: a content part of type 'text' has no",
        ),
        (USER | {"content": ["hi"]}, "0.content: a content part of type None"),
        (USER | {"weight": 1}, "0: weight is for messages of the assistant, not of 'user'"),
        (USER | {"weight": 2}, "0.weight: Input should be 0 or 1"),
        (USER | {"tool_calls": [{}]}, "0: tool_calls are for messages of the assistant"),
        ({"role": "assistant"}, "0: has neither content nor tool_calls"),
        (USER | {"function_call": {}}, "0.function_call: Extra inputs are not permitted"),
    ],
)
def test_messages_that_cannot_be_learnt_are_refused_by_field(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidBatchError, match=f"^examples.0.messages.{re.escape(reason)}"):
        read_body(to_json({"examples": [{"messages": [message]}]}))


PREFERENCE: dict[str, Any] = {
    "input": {"messages": [USER]},
    "preferred_output": [{"role": "assistant", "content": "ho"}],
    "non_preferred_output": [{"role": "assistant", "content": "hum"}],
}


@pytest.mark.parametrize("pack", [to_json, msgpack.packb])
def test_a_batch_of_preferences_has_a_beta(pack) -> None:
    told = read_body(pack({"examples": [PREFERENCE, PREFERENCE], "beta": 0.5}))
    untold = read_body(pack({"examples": [PREFERENCE]}))
    assert all(isinstance(example, Preference) for example in told.examples)
    assert (told.beta_of_preferences, untold.beta_of_preferences) == (0.5, 0.1)
    assert read_body(pack({"examples": [{"text": "a"}]})).beta_of_preferences is None


@pytest.mark.parametrize(("example", "default"), [({"text": "a"}, 1.0), (PREFERENCE, 0.2)])
def test_preferences_are_learnt_at_a_lower_rate_unless_told_otherwise(
    example: dict[str, Any], default: float
) -> None:
    body = {"examples": [example]}
    assert read_body(to_json(body)).chosen_multiplier == default
    assert read_body(to_json(body | {"learning_rate_multiplier": 3})).chosen_multiplier == 3.0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"input": {"messages": []}}, r"\.input\.messages: List should have at least 1 item"),
        ({"input": {"prompt": "hi"}}, r"\.input\.messages: Field required"),
        ({"preferred_output": []}, r"\.preferred_output: List should have at least 1 item"),
        ({"preferred_output": [USER]}, r"\.preferred_output: must be a message of the assistant"),
        (
            {"non_preferred_output": [{"role": "assistant", "content": "hum", "weight": 0}]},
            r"\.non_preferred_output: must be a message of the assistant, without weight 0",
        ),
        (
            {"non_preferred_output": PREFERENCE["preferred_output"]},
            ": preferred_output and non_preferred_out",
        ),
        ({"weight": 1}, r"\.weight: Extra inputs are not permitted"),
    ],
)
def test_a_wrong_preference_is_refused_by_field(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidBatchError, match=f"^examples.0{reason}"):
        read_body(to_json({"examples": [PREFERENCE | changes]}))


@pytest.mark.parametrize("missing", PREFERENCE)
def test_a_preference_has_an_input_and_both_outputs(missing: str) -> None:
    example = {key: value for key, value in PREFERENCE.items() if key != missing}
    with pytest.raises(InvalidBatchError, match=f"examples.0.{missing}: Field required"):
        read_body(to_json({"examples": [example]}))


@pytest.mark.parametrize("beta", [0, 2.5, "auto"])
def test_a_beta_out_of_range_is_refused(beta: object) -> None:
    with pytest.raises(InvalidBatchError, match=r"^beta: Input should be"):
        read_body(to_json({"examples": [PREFERENCE], "beta": beta}))


def test_preferences_and_ordinary_examples_are_two_batches() -> None:
    with pytest.raises(InvalidBatchError, match=r"examples\.0 and examples\.2 one is a preference"):
        read_body(to_json({"examples": [{"text": "a"}, {"text": "b"}, PREFERENCE]}))
