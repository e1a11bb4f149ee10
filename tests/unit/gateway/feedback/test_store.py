"""What of answers and feedback outlives the gateway, and what is forgotten."""

import stat
from pathlib import Path

import pytest

from services.gateway.feedback.answers import Lesson, StoredAnswer
from services.gateway.feedback.batches import BatchState, batch_of
from services.gateway.feedback.store import AnswerLimits, FeedbackRecord, FeedbackStore
from shared.errors import ConfigurationError

NO_LIMITS = AnswerLimits(max_answers=100, max_bytes=1 << 20, max_age_s=1e9)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "feedback.sqlite"


@pytest.fixture
def store(path: Path) -> FeedbackStore:
    return FeedbackStore(path)


def answer(number: int, text: str = "said") -> StoredAnswer:
    choice = {"role": "assistant", "content": text}
    return StoredAnswer(
        id=f"a{number}", key_id="k", created_at=number, model="m", prompts=("p",), choices=(choice,)
    )


def record(number: int, answer_id: str = "a1") -> FeedbackRecord:
    return FeedbackRecord(
        id=f"fb-{number}",
        key_id="k",
        producer="ann (k)",
        created_at=number,
        answer_id=answer_id,
        choice=0,
        score=None,
    )


def lesson(number: int) -> Lesson:
    return Lesson("example", b'{"text":"%d"}' % number)


def kept(store: FeedbackStore, *numbers: int) -> list[int]:
    return [number for number in numbers if store.find_answer(f"a{number}") is not None]


def test_all_is_there_after_a_restart(store: FeedbackStore, path: Path) -> None:
    store.keep_answers([answer(1)])
    store.add_feedback(record(1), [lesson(1)])
    store.assign(store.waiting_lessons("example", 9))
    (batch,) = store.batches_to_publish()
    store.close()

    store = FeedbackStore(path)
    assert store.find_answer("a1") == answer(1)
    assert store.find_feedback("fb-1") == record(1)
    assert store.batches_to_publish() == [batch]
    assert store.waiting_lessons("example", 9) == []
    store.write_states([BatchState(batch.id, "published", 3)])
    assert store.batches_to_publish() == []
    assert store.batches() == [BatchState(batch.id, "published", 3)]


def test_others_cannot_read_it(store: FeedbackStore, path: Path) -> None:
    store.keep_answers([answer(1)])
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}


def test_a_file_that_is_no_database_is_told(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("no database, but text of some length" * 100)
    with pytest.raises(ConfigurationError, match=r"feedback\.sqlite cannot hold feedback"):
        FeedbackStore(path)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (NO_LIMITS, [1, 2, 3, 4]),
        (AnswerLimits(max_answers=2, max_bytes=1 << 20, max_age_s=1e9), [3, 4]),
        (AnswerLimits(max_answers=9, max_bytes=1 << 20, max_age_s=7.0), [3, 4]),
        (AnswerLimits(max_answers=9, max_bytes=400, max_age_s=1e9), [3, 4]),
    ],
)
def test_the_oldest_answers_are_forgotten(
    limits: AnswerLimits, expected: list[int], store: FeedbackStore
) -> None:
    answers = [answer(number) for number in (1, 2, 3, 4)]
    assert 400 // 3 < len(answers[0].model_dump_json()) <= 400 // 2, "two of them have no more than 400 bytes"
    store.keep_answers(answers[:3])
    store.keep_answers(answers[3:])
    store.forget_answers(limits, now_s=10.0)
    assert kept(store, 1, 2, 3, 4) == expected


def test_the_same_feedback_has_its_lessons_once(store: FeedbackStore) -> None:
    store.add_feedback(record(1), [lesson(1)])
    store.add_feedback(record(1), [lesson(1)])
    (waiting,) = store.waiting_lessons("example", 9)
    assert (waiting.feedback_id, waiting.line) == ("fb-1", lesson(1).line)
    assert (store.num_of_answer("a1"), store.num_unfinished()) == (1, 1)


def test_what_was_said_is_dropped_once_it_is_learnt(store: FeedbackStore) -> None:
    store.add_feedback(record(1), [lesson(1)])
    lessons = store.waiting_lessons("example", 9)
    store.assign(lessons)
    state = BatchState(batch_of(lessons).id, "durable", 3, 7)
    store.write_states([state])
    (taught,) = store.lessons_of(["fb-1"])["fb-1"]
    assert (taught.sha256, taught.batch) == (lesson(1).sha256, state)
    assert store.num_unfinished() == 0


def test_feedback_is_forgotten_once_it_is_finished_and_cannot_be_sent_again(store: FeedbackStore) -> None:
    """By the answer that is forgotten; while feedback is under way, or its answer is there, it stays."""
    store.keep_answers([answer(4)])
    store.add_feedback(record(1, "a1"), [])
    store.add_feedback(record(2, "a2"), [lesson(2)])
    store.add_feedback(record(3, "a3"), [])
    store.add_feedback(record(4, "a4"), [])
    store.add_feedback(record(5, "a5"), [])
    store.forget_feedback(max_kept=1)
    left = [each.id for each in store.list_feedback(None, before=None, limit=9)]
    assert left == ["fb-5", "fb-4", "fb-2"]


def test_feedback_is_listed_by_key_and_page(store: FeedbackStore) -> None:
    for number in (1, 2, 3):
        store.add_feedback(record(number), [])
    assert [each.id for each in store.list_feedback("k", before="fb-3", limit=1)] == ["fb-2"]
    assert store.list_feedback("other", before=None, limit=9) == []
