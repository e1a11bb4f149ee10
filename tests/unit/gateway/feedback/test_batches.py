"""Corrections become batches: which of them together, under which id, and how a batch stands after events."""

import json
from hashlib import sha256

import pytest
from msgspec.structs import replace

from services.gateway.feedback.batches import (
    ENVELOPE_BYTES,
    BatchState,
    WaitingLesson,
    after,
    after_unknown,
    batch_of,
    due,
    newest_durable,
)
from services.trainer.intake.data import read_body
from shared.messages.lineage import MAX_NAME_CHARACTERS
from shared.messages.training import (
    BatchApplied,
    BatchDurable,
    BatchEvent,
    BatchHeldOut,
    BatchPlaced,
    BatchRejected,
)

LINE = b'{"prompt":"a","completion":"b"}'


def lesson(number: int, *, at: int = 0, producer: str = "ann (k1)", line: bytes = LINE) -> WaitingLesson:
    return WaitingLesson(number, f"fb-{number}", "example", producer, at, line)


def numbers(lessons: list[WaitingLesson], now_s: float, max_bytes: int = 1 << 20) -> list[int]:
    chosen = due(lessons, now_s=now_s, size=3, after_s=60.0, max_bytes=max_bytes)
    return [each.number for each in chosen]


def test_as_many_as_a_batch_holds_go_at_once_and_fewer_when_the_oldest_has_waited() -> None:
    few = [lesson(1, at=100), lesson(2, at=150)]
    assert numbers(few, now_s=159.9) == []
    assert numbers(few, now_s=160.0) == [1, 2]
    assert numbers([*few, lesson(3, at=151), lesson(4, at=152)], now_s=152.0) == [1, 2, 3]
    assert numbers([], now_s=1e9) == []


def test_a_batch_is_no_larger_than_a_message() -> None:
    size = lesson(1).num_bytes
    many = [lesson(number) for number in range(3)]
    assert numbers(many, now_s=0.0, max_bytes=ENVELOPE_BYTES + 2 * size) == [0, 1]
    assert numbers(many, now_s=0.0, max_bytes=ENVELOPE_BYTES + 2 * size - 1) == [0]


def test_what_is_sent_fits_into_the_room_that_was_counted() -> None:
    widest = "\N{GRINNING FACE}" * (MAX_NAME_CHARACTERS - 1)
    lessons = [lesson(number, producer=f"{widest}{number}") for number in range(3)]
    counted = ENVELOPE_BYTES + sum(each.num_bytes for each in lessons)
    assert len(batch_of(lessons).body) < counted


def test_a_batch_names_its_sources_and_its_id_follows_from_them() -> None:
    lessons = [lesson(1), lesson(2, producer="bob (k2)"), lesson(3)]
    batch = batch_of(lessons)
    body = read_body(batch.body)
    assert (body.id, body.producer) == (batch.id, "ann (k1), bob (k2)")
    assert [(each.id, each.producer, each.sha256) for each in body.sources] == [
        (f"fb-{each.number}", each.producer, sha256(LINE).hexdigest()) for each in lessons
    ]
    assert json.loads(batch.body)["examples"] == [json.loads(LINE)] * 3
    assert batch_of(lessons) == batch
    assert len({batch.id, batch_of(lessons[:2]).id, batch_of(lessons[::-1]).id}) == 3


PUBLISHED = BatchState("b", "published", 5)
APPLIED = BatchApplied(batch_id="b", node=0, version=3, loss=1.0, num_tokens=9)
DURABLE = BatchDurable(batch_ids=("b",), node=0, version=4, checkpoint="/c")
PARTLY_APPLIED = replace(APPLIED, held_out=(1,))
PARTLY_DURABLE = replace(DURABLE, held_out={"b": (1,), "c": (0,)})
REJECTED = BatchRejected(batch_id="b", reason="NaN")
PLACED = BatchPlaced(batch_id="b", node=0)


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([PLACED], PUBLISHED),
        ([APPLIED], BatchState("b", "applied", 5, 3)),
        ([APPLIED, PLACED], PUBLISHED),
        ([APPLIED, DURABLE], BatchState("b", "durable", 5, 4)),
        ([DURABLE, APPLIED, PLACED], BatchState("b", "durable", 5, 4)),
        ([PARTLY_APPLIED], BatchState("b", "applied", 5, 3, held_out=(1,))),
        ([PARTLY_APPLIED, PLACED, APPLIED], BatchState("b", "applied", 5, 3)),
        ([PARTLY_DURABLE], BatchState("b", "durable", 5, 4, held_out=(1,))),
        ([REJECTED], BatchState("b", "rejected", 5, None, "NaN")),
        ([BatchHeldOut(batch_id="b")], BatchState("b", "held_out", 5)),
        ([DURABLE, REJECTED], BatchState("b", "rejected", 5, None, "NaN")),
    ],
)
def test_a_batch_stands_as_its_events_say(events: list[BatchEvent], expected: BatchState) -> None:
    state = PUBLISHED
    for event in events:
        state = after(state, event)
    assert state == expected


def test_a_batch_that_the_trainer_has_passed_by_is_published_again() -> None:
    assert after_unknown(PUBLISHED, read_up_to=4) == PUBLISHED
    assert after_unknown(PUBLISHED, read_up_to=5) == BatchState("b", "assigned")
    durable = after(PUBLISHED, DURABLE)
    assert after_unknown(durable, read_up_to=9) == durable


def test_of_durable_batches_those_are_newest_that_are_last_in_the_stream() -> None:
    states = [BatchState(f"b{number}", "durable", number, 4) for number in (3, 9, 5)]
    others = [BatchState("c", "applied", 10, 5), BatchState("d", "rejected", 11)]
    assert newest_durable([*states, *others], 2) == ["b9", "b5"]
    assert newest_durable(others, 2) == []
