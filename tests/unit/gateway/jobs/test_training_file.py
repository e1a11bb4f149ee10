"""Training files: which lines can be learnt from, and how they are cut into batches."""

import json
from pathlib import Path

import pytest

from services.gateway.jobs.training_file import (
    MAX_FAULTS_SHOWN,
    AbandonedError,
    InvalidFileError,
    TrainingFile,
    examples_of,
    read_training_file,
)
from services.trainer.intake.data import read_body
from shared.clock import SystemClock
from shared.encoding import ExampleEncoder
from shared.examples import PlainText, TokenIds
from shared.model_files import read_card
from shared.settings import EMBEDDED_MODEL
from tests.unit.gateway.jobs.support import running_job

FOLDER = Path(EMBEDDED_MODEL)
ENCODER = ExampleEncoder.load(read_card(FOLDER, "m"), FOLDER, SystemClock(), max_tokens=64)


def read(content: bytes) -> TrainingFile:
    return read_training_file(content, ENCODER, of_preferences=False, is_wanted=lambda: True)


def refusal(content: bytes) -> str:
    with pytest.raises(InvalidFileError) as raised:
        read(content)
    assert raised.value.error.param == "training_file"
    return raised.value.error.message


def test_each_line_is_an_example_and_blank_ones_are_none() -> None:
    file = read(b'\n{"token_ids": [1, 2, 3]}\r\n \n{"text": "a b"}')
    assert file.lines == (b'{"token_ids": [1, 2, 3]}', b'{"text": "a b"}')
    assert file.num_tokens[0] == 3


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"token_ids": [1, 99999]}', "line 2: token id 99999 is not in 0..4095"),
        (b'{"token_ids": [1]}', "line 2: has 1 tokens, needs at least 2"),
        (b'{"text": "a", "weight": 1}', "line 2: weight: Extra inputs are not permitted"),
        (b"[]", "line 2: has none of the keys"),
        (b'{"text": "\xff"}', "line 2: Invalid JSON"),
        (json.dumps({"text": "word " * 100}).encode(), "tokens, at most 64 can be learnt at once"),
    ],
)
def test_a_wrong_line_is_named_with_its_reason(line: bytes, reason: str) -> None:
    assert reason in refusal(b'{"text": "good"}\n' + line)


def test_of_many_wrong_lines_the_first_are_named_and_the_others_counted() -> None:
    message = refusal(b"no\n" * (MAX_FAULTS_SHOWN + 5))
    assert f"line {MAX_FAULTS_SHOWN}:" in message and f"line {MAX_FAULTS_SHOWN + 1}:" not in message
    assert message.endswith("and 5 more")


def test_a_file_without_examples_is_refused() -> None:
    assert "holds no example" in refusal(b"\n")


def test_a_tokenizer_that_breaks_is_the_lines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(encoder: ExampleEncoder, example: object) -> None:
        raise RecursionError("too deep")

    monkeypatch.setattr(ExampleEncoder, "encode", broken)
    assert "line 1: RecursionError: too deep" in refusal(b'{"text": "a"}')


def test_a_file_that_nobody_waits_for_is_left() -> None:
    answers = iter((True, False))
    with pytest.raises(AbandonedError):
        read_training_file(
            b'{"text": "a"}\nno\nno', ENCODER, of_preferences=False, is_wanted=lambda: next(answers)
        )


def test_every_example_is_in_each_epoch_once_in_an_order_of_its_own() -> None:
    job = running_job(num_examples=23, n_epochs=3, batch_size=4)
    assert job.total_steps == 18
    epochs = [[examples_of(job, step) for step in range(start, start + 6)] for start in (1, 7, 13)]
    orders = [[place for batch in epoch for place in batch] for epoch in epochs]
    assert all(sorted(order) == list(range(23)) for order in orders)
    assert all([len(batch) for batch in epoch] == [4, 4, 4, 4, 4, 3] for epoch in epochs)
    assert len({tuple(order) for order in orders}) == 3


def test_the_order_of_a_seed_stays_what_it_is_or_jobs_that_run_would_change_under_way() -> None:
    job = running_job(num_examples=6, batch_size=6, n_epochs=1, seed=5)
    assert examples_of(job, 1) == (3, 4, 1, 0, 2, 5)


@pytest.mark.parametrize(("asked_by", "producer"), [("", "{id}"), ("Zoë (k1)", "{id}, key Zoë (k1)")])
def test_a_batch_names_its_job_and_the_key_that_asked_for_it(asked_by: str, producer: str) -> None:
    job = running_job(num_examples=1, batch_size=1, n_epochs=1).model_copy(update={"asked_by": asked_by})
    content, _ = TrainingFile((b'{"text": "a"}',), (2,)).batch_of(job, 1)
    assert read_body(content).producer == producer.format(id=job.id)


def test_a_batch_is_what_the_trainer_reads() -> None:
    lines = (b'{"text": "a ' + "ü😀".encode() + b'"}', b'{ "token_ids" : [1, 2] }')
    job = running_job(num_examples=2, batch_size=2, n_epochs=1)
    content, num_tokens = TrainingFile(lines, (5, 2)).batch_of(job, 1)
    body = read_body(content)
    assert (body.id, body.learning_rate_multiplier, num_tokens) == (job.batch_id(1), 1.0, 7)
    assert sorted(body.examples, key=str) == sorted(
        [PlainText(text="a ü😀"), TokenIds(token_ids=[1, 2])], key=str
    )


def test_batches_are_checked_by_their_longest_lines() -> None:
    file = TrainingFile((b"x" * 1000, b"x" * 10, b"x" * 1000), (1, 1, 1))
    file.check_batches(batch_size=2, max_bytes=2002 + 1024)
    with pytest.raises(InvalidFileError, match="2 longest lines have 2002 bytes"):
        file.check_batches(batch_size=2, max_bytes=2001 + 1024)
