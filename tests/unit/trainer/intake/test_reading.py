"""A message becomes a batch, or the reason why not: nothing that it says ends the trainer."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest

from services.gateway.feedback.answers import StoredAnswer, lessons_of
from services.trainer.intake.microbatches import HeldOutBatch, TrainingBatch
from services.trainer.intake.reading import Intake
from services.trainer.publication.hold_out import HoldOut, is_chosen
from services.trainer.settings import TrainerSettings
from shared.bus.base import StreamMessage
from shared.clock import SystemClock
from shared.encoding import ExampleEncoder
from shared.examples import TokenIds
from shared.messages.lineage import ExampleSource, LearntBatch
from shared.messages.training import BatchChecked, RejectedBatch
from shared.settings import EMBEDDED_MODEL

BODY = b'{"examples": [{"token_ids": [1, 2, 3]}]}'


async def ack() -> None:
    pass


def prepared(body: bytes, **headers: str) -> object:
    intake = Intake.load(TrainerSettings(), Path(EMBEDDED_MODEL), SystemClock())
    return intake.prepare(StreamMessage(7, body, headers, ack))


@pytest.mark.parametrize(
    ("body", "headers"),
    [(BODY.replace(b"{", b'{"id": "seq-7", ', 1), {}), (BODY, {"Nats-Msg-Id": "seq-7"})],
)
def test_an_id_like_those_of_nameless_batches_is_refused(body: bytes, headers: dict[str, str]) -> None:
    reason = "id: ids that begin with 'seq-' are kept for batches without one"
    assert prepared(body, **headers) == RejectedBatch.of(body, batch_id="seq-7", sequence=7, reason=reason)


WRONG = {"id": "mine", "examples": [{"text": 3}]}


@pytest.mark.parametrize(
    ("body", "headers", "batch_id"),
    [
        (json.dumps(WRONG).encode(), {}, "mine"),
        (b"\xef\xbb\xbf" + json.dumps(WRONG).encode(), {}, "mine"),
        (msgpack.packb(WRONG), {}, "mine"),
        (json.dumps(WRONG).encode(), {"Nats-Msg-Id": "header"}, "mine"),
        (json.dumps(WRONG | {"id": 7}).encode(), {}, "seq-7"),
        (json.dumps(WRONG | {"id": 7}).encode(), {"Nats-Msg-Id": "header"}, "header"),
        (json.dumps(WRONG | {"id": "x" * 257}).encode(), {}, "seq-7"),
        (b'{"id": "mine", "examples": [', {}, "seq-7"),
        (msgpack.packb(WRONG)[:-1], {}, "seq-7"),
        (b"[]", {}, "seq-7"),
    ],
)
def test_a_batch_with_a_wrong_field_is_rejected_under_its_own_id(
    body: bytes, headers: dict[str, str], batch_id: str
) -> None:
    """Under the place in the stream only where no id can be read."""
    rejected = prepared(body, **headers)
    assert isinstance(rejected, RejectedBatch)
    assert (rejected.batch_id, rejected.sequence) == (batch_id, 7)


def test_a_body_may_begin_with_a_byte_order_mark() -> None:
    batch = prepared(b"\xef\xbb\xbf" + BODY)
    assert isinstance(batch, TrainingBatch)
    assert batch.microbatches[0].tokens == (1, 2, 3)


def test_an_unexpected_error_rejects_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(encoder: ExampleEncoder, example: object) -> Sequence[int]:
        raise RecursionError("too deep")

    monkeypatch.setattr(ExampleEncoder, "encode", broken)
    reason = "RecursionError: too deep"
    assert prepared(BODY) == RejectedBatch.of(BODY, batch_id="seq-7", sequence=7, reason=reason)


def test_the_lineage_of_weights_tells_who_has_published_a_batch_and_its_hash() -> None:
    source = {"id": "feedback-1", "producer": "ann", "sha256": "1" * 64}
    examples = [{"token_ids": [1, 2, 3]}]
    body = json.dumps({"id": "b", "producer": "bob", "examples": examples, "sources": [source]}).encode()
    batch = prepared(body)
    assert isinstance(batch, TrainingBatch)
    assert batch.sha256 == hashlib.sha256(body).hexdigest(), "known before a checkpoint asks for it"
    assert batch.as_learnt() == LearntBatch(
        id="b",
        sequence=7,
        producer="bob",
        sha256=hashlib.sha256(body).hexdigest(),
        sources=(ExampleSource(**source),),
    )
    unsigned = prepared(BODY)
    assert isinstance(unsigned, TrainingBatch)
    assert (unsigned.as_learnt().producer, unsigned.as_learnt().sources) == ("", ())


def test_examples_that_are_held_out_do_not_train_and_the_rest_is_cut_as_without_them(tmp_path: Path) -> None:
    plain = Intake.load(TrainerSettings(microbatches=3), Path(EMBEDDED_MODEL), SystemClock())
    holding = replace(plain, hold_out=HoldOut(tmp_path, model="m", share=0.3))
    examples = [{"token_ids": [number, 7, *range(number % 5)]} for number in range(20)]

    def batch_of(kept: Sequence[dict[str, list[int]]], intake: Intake) -> object:
        sources = [{"id": str(each), "producer": "ann", "sha256": "1" * 64} for each in kept]
        body = json.dumps({"examples": kept, "sources": sources}).encode()
        return intake.prepare(StreamMessage(7, body, {}, ack))

    encoded = [plain.encoder.encode(TokenIds.model_validate(each)) for each in examples]
    kept = [each for each, rows in zip(examples, encoded, strict=True) if not is_chosen(rows, 0.3)]
    assert 0 < len(kept) < len(examples)
    trained, expected = batch_of(examples, holding), batch_of(kept, plain)
    assert isinstance(trained, TrainingBatch) and isinstance(expected, TrainingBatch)
    assert trained.microbatches == expected.microbatches
    assert (trained.loss_weight, trained.sources) == (expected.loss_weight, expected.sources)
    assert [each for place, each in enumerate(examples) if place not in trained.held_out] == kept
    assert expected.held_out == ()
    held = [each for each in examples if each not in kept]
    assert batch_of(held, holding) == HeldOutBatch("seq-7")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"examples": [{"text": "a"}, {"token_ids": [1, 2]}]}', BatchChecked()),
        (
            b'{"examples": [{"text": "a"}, {"token_ids": [1, 999999]}]}',
            BatchChecked(reason="token id 999999 is not in 0..", example=1),
        ),
        (b'{"examples": [], "beta": 1}', BatchChecked(reason="examples: ", example=None)),
    ],
)
def test_whoever_asks_is_told_what_would_be_rejected(body: bytes, expected: BatchChecked) -> None:
    intake = Intake.load(TrainerSettings(), Path(EMBEDDED_MODEL), SystemClock())
    checked = intake.check(body)
    assert checked.example == expected.example and checked.reason.startswith(expected.reason)
    message = StreamMessage(1, body, {}, ack)
    assert isinstance(intake.prepare(message), RejectedBatch) == bool(checked.reason)


SAID = StoredAnswer(
    id="a",
    key_id="",
    created_at=0,
    model="m",
    messages=(
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ),
    choices=({"role": "assistant", "content": "wrong"},),
)


def lessons_about(number: int) -> tuple[bytes, bytes]:
    """An example and a preference, as the gateway makes them of a correction."""
    example, preference = lessons_of(SAID, 0, {"role": "assistant", "content": f"right {number}"})
    return example.line, preference.line


@pytest.mark.parametrize("is_example_first", [True, False])
def test_a_correction_that_is_held_out_does_not_train_as_the_preferred_answer_either(
    is_example_first: bool, tmp_path: Path
) -> None:
    intake = Intake.load(TrainerSettings(), Path(EMBEDDED_MODEL), SystemClock())
    intake = replace(intake, hold_out=HoldOut(tmp_path, model="m", share=0.3))

    def is_trained(line: bytes) -> bool:
        prepared = intake.prepare(StreamMessage(7, b'{"examples": [%s]}' % line, {}, ack))
        assert isinstance(prepared, TrainingBatch | HeldOutBatch)
        return isinstance(prepared, TrainingBatch)

    pairs = [lessons_about(number) for number in range(20)]
    in_order = pairs if is_example_first else [pair[::-1] for pair in pairs]
    trained = [tuple(map(is_trained, pair)) for pair in in_order]
    assert set(trained) == {(True, True), (False, False)}


def test_of_a_batch_of_preferences_those_that_are_not_held_out_train(tmp_path: Path) -> None:
    plain = Intake.load(TrainerSettings(), Path(EMBEDDED_MODEL), SystemClock())
    preferences = [lessons_about(number)[1] for number in range(20)]

    def batch_of(lines: Sequence[bytes], intake: Intake) -> object:
        return intake.prepare(StreamMessage(7, b'{"examples": [%s]}' % b",".join(lines), {}, ack))

    holding = replace(plain, hold_out=HoldOut(tmp_path, model="m", share=0.3))
    kept = [line for line in preferences if isinstance(batch_of([line], holding), TrainingBatch)]
    assert 0 < len(kept) < len(preferences)
    trained, expected = batch_of(preferences, holding), batch_of(kept, plain)
    assert isinstance(trained, TrainingBatch) and isinstance(expected, TrainingBatch)
    assert (trained.microbatches, trained.beta) == (expected.microbatches, expected.beta)
    assert trained.loss_weight == expected.loss_weight
