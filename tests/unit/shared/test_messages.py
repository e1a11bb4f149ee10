import math
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import subjects
from shared.errors import MalformedMessageError
from shared.messages.base import Message
from shared.messages.cluster import LinkOffer
from shared.messages.inference import CancelTask, InferenceTask, Sampling
from shared.messages.training import (
    BatchesAsked,
    BatchStepped,
    Microbatch,
    MicrobatchForward,
    StageReport,
    StepAhead,
)
from shared.subjects import RequestTopic, Topic

MICROBATCH = {
    "fence": 1,
    "batch_id": "b",
    "index": 0,
    "count": 1,
    "lengths": [2],
    "label_rows": [0],
    "labels": [7],
    "loss_weight": 1.0,
}
PAIR = MICROBATCH | {"lengths": [2, 2], "label_rows": [0, 2], "labels": [7, 8], "beta": 0.1}
HIDDEN = {"carrier": "inline", "shape": [4, 1], "dtype": "float32", "size_bytes": 16}
TASK = {"task_id": "t", "gateway": "g", "prompt": [1], "sampling": {"max_tokens": 1}, "timeout_s": 1}
OFFER = {"stage": 0, "instance": "i", "carrier": "shm", "place": "/x", "slot_bytes": 8, "num_slots": 1}


def test_a_message_travels_as_a_map_of_all_its_fields_in_their_order() -> None:
    report = StageReport(node=0, stage=1, fence=3, event=BatchStepped(batch_id="b", version=2, loss=0.5))
    event = {"kind": "stepped", "batch_id": "b", "version": 2, "loss": 0.5}
    assert report.pack() == msgpack.packb({"node": 0, "stage": 1, "fence": 3, "event": event})


def test_a_step_without_a_limit_travels() -> None:
    step = StepAhead(fence=1, batch_id="b", version=1, learning_rate=0.1)
    assert StepAhead.unpack(step.pack()) == step


def test_what_was_packed_is_read_again_with_numbers_and_lists_as_their_types_say() -> None:
    body = msgpack.packb(TASK | {"prompt": [3, 2**31]})
    task = InferenceTask.unpack(body)
    assert task == InferenceTask(
        task_id="t", gateway="g", prompt=(3, 2**31), sampling=Sampling(max_tokens=1), timeout_s=1.0
    )
    assert isinstance(task.timeout_s, float) and InferenceTask.unpack(task.pack()) == task


@pytest.mark.parametrize(
    ("kind", "content", "fault"),
    [
        (CancelTask, {}, "CancelTask: Object missing required field `task_id`"),
        (CancelTask, {"task_id": "t", "why": ""}, "CancelTask: Object contains unknown field `why`"),
        (CancelTask, {"task_id": 1}, r"CancelTask: Expected `str`, got `int` - at `\$.task_id`"),
        (CancelTask, ["t"], "CancelTask: Expected `object`, got `array`"),
        (InferenceTask, TASK | {"gateway": "a.b.c"}, r"regex .* - at `\$.gateway`"),
        (InferenceTask, TASK | {"gateway": "a\n"}, r"regex .* - at `\$.gateway`"),
        (InferenceTask, TASK | {"timeout_s": 0}, r"> 0.0 - at `\$.timeout_s`"),
        (InferenceTask, TASK | {"timeout_s": math.inf}, r"at `\$.timeout_s`"),
        (InferenceTask, TASK | {"timeout_s": math.nan}, r"at `\$.timeout_s`"),
        (InferenceTask, TASK | {"sampling": {"max_tokens": -1}}, r"at `\$.sampling.max_tokens`"),
        (InferenceTask, TASK | {"sampling": {"max_tokens": 1.5}}, r"at `\$.sampling.max_tokens`"),
        (InferenceTask, TASK | {"sampling": {"max_tokens": 1, "top_p": 0.0}}, r"at `\$.sampling.top_p`"),
        (InferenceTask, TASK | {"sampling": {"max_tokens": 1, "num_logprobs": 21}}, "<= 20"),
        (LinkOffer, OFFER | {"num_slots": 257}, "<= 256"),
        (LinkOffer, OFFER | {"purpose": "other"}, r"Invalid enum value 'other' - at `\$.purpose`"),
        (BatchesAsked, {"batch_ids": ["b"] * 65}, "length <= 64"),
        (Microbatch, MICROBATCH | {"lengths": []}, "length >= 1"),
        (Microbatch, MICROBATCH | {"index": 1}, "Microbatch: microbatch 1 of 1"),
        (Microbatch, MICROBATCH | {"labels": [1, 2]}, "Microbatch: 2 labels for 1 rows"),
        (Microbatch, MICROBATCH | {"beta": 0.1}, "Microbatch: 1 sequences are no pairs"),
        (Microbatch, MICROBATCH | {"beta": 0.0}, r"> 0.0 - at `\$.beta`"),
        (MicrobatchForward, {"microbatch": PAIR, "hidden": HIDDEN}, "activations of the reference come with"),
        (MicrobatchForward, {"microbatch": MICROBATCH, "reference": HIDDEN}, "and only there"),
        (MicrobatchForward, {"microbatch": PAIR, "tokens": [1, 2], "reference": HIDDEN}, "and only there"),
        (StageReport, {"node": 0, "stage": 0, "fence": 0, "event": {"kind": "x"}}, "Invalid value 'x'"),
    ],
)
def test_a_body_of_another_shape_is_refused_with_the_type_and_the_fault(
    kind: type[Message], content: Any, fault: str
) -> None:
    with pytest.raises(MalformedMessageError, match=f"^{kind.__name__}: ") as refusal:
        kind.unpack(msgpack.packb(content))
    assert refusal.match(fault)


@pytest.mark.parametrize(
    "body", [b"", b"\xc1", b"\x81\xa1a\xa1\xff", b"\x81" * 5000, CancelTask(task_id="").pack() + b"\x00"]
)
def test_bytes_that_are_no_message_are_refused(body: bytes) -> None:
    with pytest.raises(MalformedMessageError, match=r"^CancelTask: "):
        CancelTask.unpack(body)


def _kinds() -> list[type[Message]]:
    topics = [topic for topic in vars(subjects).values() if isinstance(topic, Topic | RequestTopic)]
    replies = [topic.reply for topic in topics if isinstance(topic, RequestTopic)]
    return sorted({topic.message for topic in topics} | set(replies), key=lambda kind: kind.__name__)


@given(kind=st.sampled_from(_kinds()), body=st.binary(max_size=40))
def test_whatever_bytes_arrive_are_a_message_or_are_refused(kind: type[Message], body: bytes) -> None:
    try:
        message = kind.unpack(body)
    except MalformedMessageError:
        return
    assert isinstance(message, kind)


@pytest.mark.parametrize("rows", [{"tokens": [1, 2, 3, 4]}, {"hidden": HIDDEN, "reference": HIDDEN}])
def test_a_microbatch_of_preferences_travels_with_its_reference_from_the_second_stage_on(
    rows: dict[str, Any],
) -> None:
    forward = MicrobatchForward.unpack(msgpack.packb({"microbatch": PAIR, **rows}))
    assert MicrobatchForward.unpack(forward.pack()) == forward
    assert len(forward.tensors) == (0 if "tokens" in rows else 2)


def test_what_is_made_here_must_be_consistent_too() -> None:
    with pytest.raises(ValueError, match="microbatch 3 of 1"):
        Microbatch(**MICROBATCH | {"index": 3})


def test_a_message_does_not_change_and_takes_no_positions() -> None:
    with pytest.raises(AttributeError):
        CancelTask(task_id="t").task_id = "other"
    with pytest.raises(TypeError):
        CancelTask("t")
