"""What of answers and feedback outlives the gateway, and what is forgotten."""

import sqlite3
import stat
from pathlib import Path

import pytest

from services.gateway.feedback.answer_store import AnswerLimits, AnswerStore
from services.gateway.feedback.answers import Lesson, StoredAnswer
from services.gateway.feedback.batch_store import BatchStore
from services.gateway.feedback.batches import BatchState, batch_of
from services.gateway.feedback.database import Database
from services.gateway.feedback.feedback_store import FeedbackRecord, FeedbackStore
from shared.errors import ConfigurationError

NO_LIMITS = AnswerLimits(max_answers=100, max_bytes=1 << 20, max_age_s=1e9)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "feedback.sqlite"


class Stores:
    """All that lies in one file."""

    def __init__(self, path: Path) -> None:
        self.database = Database(path)
        self.answers = AnswerStore(self.database)
        self.feedback = FeedbackStore(self.database)
        self.batches = BatchStore(self.database)


@pytest.fixture
def stores(path: Path) -> Stores:
    return Stores(path)


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


def kept(stores: Stores, *numbers: int) -> list[int]:
    return [number for number in numbers if stores.answers.find(f"a{number}") is not None]


def test_all_is_there_after_a_restart(stores: Stores, path: Path) -> None:
    stores.answers.keep([answer(1)])
    stores.feedback.add(record(1), [lesson(1)])
    stores.batches.assign(stores.batches.waiting("example", 9))
    (batch,) = stores.batches.to_publish()
    stores.database.close()

    stores = Stores(path)
    assert stores.answers.find("a1") == answer(1)
    assert stores.feedback.find("fb-1") == record(1)
    assert stores.batches.to_publish() == [batch]
    assert stores.batches.waiting("example", 9) == []
    stores.batches.write_states([BatchState(batch.id, "published", 3)])
    assert stores.batches.to_publish() == []
    assert stores.batches.states() == [BatchState(batch.id, "published", 3)]


def test_others_cannot_read_it(stores: Stores, path: Path) -> None:
    stores.answers.keep([answer(1)])
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}


def test_a_file_that_is_no_database_is_told(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("no database, but text of some length" * 100)
    with pytest.raises(ConfigurationError, match=r"feedback\.sqlite cannot hold feedback"):
        Database(path)


def test_of_a_write_that_fails_nothing_is_there(stores: Stores) -> None:
    with pytest.raises(sqlite3.IntegrityError), stores.database.transaction() as connection:
        for _ in range(2):
            connection.execute("INSERT INTO batches VALUES ('b', 'assigned', 0, NULL, '')")
    assert stores.batches.states() == []


def test_after_a_commit_that_fails_the_next_write_goes_on(stores: Stores) -> None:
    stores.database.read("PRAGMA foreign_keys=ON")
    with stores.database.transaction() as connection:
        connection.execute(
            "CREATE TABLE checked (batch_id TEXT REFERENCES batches (id) DEFERRABLE INITIALLY DEFERRED)"
        )
    with pytest.raises(sqlite3.IntegrityError), stores.database.transaction() as connection:
        connection.execute("INSERT INTO checked VALUES ('none')")  # refused at the COMMIT
    stores.feedback.add(record(1), [])
    assert stores.feedback.find("fb-1") == record(1)
    assert stores.database.read("SELECT * FROM checked") == []


def test_an_error_after_which_sqlite_has_rolled_back_by_itself_is_told(stores: Stores) -> None:
    with pytest.raises(ValueError, match="mine"), stores.database.transaction() as connection:
        connection.execute("ROLLBACK")
        raise ValueError("mine")


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (NO_LIMITS, [1, 2, 3, 4]),
        (AnswerLimits(max_answers=2, max_bytes=1 << 20, max_age_s=1e9), [3, 4]),
        (AnswerLimits(max_answers=9, max_bytes=1 << 20, max_age_s=7.0), [3, 4]),
        (AnswerLimits(max_answers=9, max_bytes=400, max_age_s=1e9), [3, 4]),
    ],
)
def test_the_oldest_answers_are_forgotten(limits: AnswerLimits, expected: list[int], stores: Stores) -> None:
    answers = [answer(number) for number in (1, 2, 3, 4)]
    assert 400 // 3 < len(answers[0].model_dump_json()) <= 400 // 2, "two of them have no more than 400 bytes"
    stores.answers.keep(answers[:3])
    stores.answers.keep(answers[3:])
    stores.answers.forget(limits, now_s=10.0)
    assert kept(stores, 1, 2, 3, 4) == expected


def test_the_same_feedback_has_its_lessons_once(stores: Stores) -> None:
    stores.feedback.add(record(1), [lesson(1)])
    stores.feedback.add(record(1), [lesson(1)])
    (waiting,) = stores.batches.waiting("example", 9)
    assert (waiting.feedback_id, waiting.line) == ("fb-1", lesson(1).line)
    assert (stores.feedback.num_of_answer("a1"), stores.feedback.num_unfinished()) == (1, 1)


def test_what_was_said_is_dropped_once_it_is_learnt(stores: Stores) -> None:
    stores.feedback.add(record(1), [lesson(1)])
    lessons = stores.batches.waiting("example", 9)
    stores.batches.assign(lessons)
    state = BatchState(batch_of(lessons).id, "durable", 3, 7)
    stores.batches.write_states([state])
    (taught,) = stores.feedback.lessons_of(["fb-1"])["fb-1"]
    assert (taught.sha256, taught.batch) == (lesson(1).sha256, state)
    assert stores.feedback.num_unfinished() == 0


def test_of_a_batch_those_lessons_are_held_out_that_were_so_when_it_was_applied_last(stores: Stores) -> None:
    for number in (1, 2, 3):
        stores.feedback.add(record(number), [lesson(number)])
    lessons = stores.batches.waiting("example", 9)
    stores.batches.assign(lessons)

    def held_out_after(held_out: tuple[int, ...]) -> list[bool]:
        stores.batches.write_states([BatchState(batch_of(lessons).id, "applied", 3, 7, held_out=held_out)])
        taught = stores.feedback.lessons_of(["fb-1", "fb-2", "fb-3"])
        return [lesson.is_held_out for (lesson,) in taught.values()]

    assert held_out_after((0, 2)) == [True, False, True]
    assert held_out_after((1,)) == [False, True, False]


def test_a_file_of_an_earlier_version_is_gone_on_with(path: Path) -> None:
    stores = Stores(path)
    stores.feedback.add(record(1), [lesson(1)])
    with stores.database.transaction() as connection:
        connection.execute("DROP TABLE held_out")
    stores.database.close()
    (taught,) = Stores(path).feedback.lessons_of(["fb-1"])["fb-1"]
    assert (taught.sha256, taught.batch, taught.is_held_out) == (lesson(1).sha256, None, False)


def test_feedback_is_forgotten_once_it_is_finished_and_cannot_be_sent_again(stores: Stores) -> None:
    """By the answer that is forgotten; while feedback is under way, or its answer is there, it stays."""
    stores.answers.keep([answer(4)])
    for number, lessons in ((1, []), (2, [lesson(2)]), (3, []), (4, []), (5, [])):
        stores.feedback.add(record(number, f"a{number}"), lessons)
    stores.feedback.forget(max_kept=1)
    left = [each.id for each in stores.feedback.newest(None, before=None, limit=9)]
    assert left == ["fb-5", "fb-4", "fb-2"]


def test_feedback_is_listed_by_key_and_page(stores: Stores) -> None:
    for number in (1, 2, 3):
        stores.feedback.add(record(number), [])
    assert [each.id for each in stores.feedback.newest("k", before="fb-3", limit=1)] == ["fb-2"]
    assert stores.feedback.newest("other", before=None, limit=9) == []
