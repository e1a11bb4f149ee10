"""What `lemix train publish` makes of a file, and what it says of what it has published."""

import io
import json
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest

from lemix.demo_data import DemoData
from lemix.publish_command import outcome
from lemix.publishing import (
    BatchLine,
    batches_in,
    check_batches,
    publish_batches,
    read_batches,
    signed,
    this_person,
)
from services.trainer.intake.data import MAX_ID_CHARACTERS, read_body
from shared.bus.base import Stored
from shared.clock import SystemClock
from shared.errors import BusError, InvalidBatchError, MessageTooLargeError
from shared.examples import PlainText
from shared.messages.training import BatchCheck, BatchChecked
from shared.settings import EMBEDDED_MODEL
from shared.subjects import BATCHES

BATCH = b'{"id": "a", "examples": [{"text": "one"}]}'
PREFERENCE = json.dumps(
    {
        "input": {"messages": [{"role": "user", "content": "hi"}]},
        "preferred_output": [{"role": "assistant", "content": "ho"}],
        "non_preferred_output": [{"role": "assistant", "content": "hum"}],
    }
).encode()
EXAMPLES = [
    {"text": "Sea calm."},
    {"prompt": "2+2=", "completion": "4"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    {"token_ids": [1, 2, 3]},
]


def lines_of(*objects: object) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in objects)


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "batches.jsonl"
    path.write_bytes(content)
    return path


def test_batches_are_taken_as_they_stand_and_empty_lines_skipped(tmp_path: Path) -> None:
    first = b'{"id": "a", "examples":  [{"text": "one"}]}'
    third = '{"examples": [{"text": "é\u2028 "}]}'.encode()
    path = write(tmp_path, first + b"\n\n" + third + b"\r\n")
    assert read_batches(path) == [
        BatchLine(number=1, batch_id="a", body=first),
        BatchLine(number=3, batch_id="", body=third),
    ]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_a_byte_order_mark_and_windows_line_ends_are_skipped(mark: bytes, line_end: bytes) -> None:
    content = mark + line_end.join([BATCH, BATCH.replace(b'"a"', b'"b"')]) + line_end
    assert [read_body(batch.body).id for batch in batches_in(content, None)] == ["a", "b"]
    of_examples = mark + lines_of(*EXAMPLES).replace(b"\n", line_end)
    (batch,) = batches_in(of_examples, None)
    assert len(read_body(batch.body).examples) == len(EXAMPLES)


def test_standard_input_is_a_file_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(BATCH)))
    assert read_batches(Path("-")) == [BatchLine(number=1, batch_id="a", body=BATCH)]
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"oops")))
    with pytest.raises(InvalidBatchError, match="standard input: line 1: not JSON"):
        read_batches(Path("-"))


@pytest.mark.parametrize(("batch_size", "sizes"), [(1, [1] * 10), (4, [4, 4, 2]), (None, [8, 2]), (99, [10])])
def test_a_file_of_examples_is_cut_into_batches_that_the_trainer_takes(
    batch_size: int | None, sizes: list[int]
) -> None:
    examples = [EXAMPLES[number % 4] for number in range(10)]
    batches = batches_in(lines_of(*examples), batch_size)
    bodies = [json.loads(batch.body) for batch in batches]
    assert [len(read_body(batch.body).examples) for batch in batches] == sizes
    assert [example for body in bodies for example in body["examples"]] == examples
    assert [body["id"] for body in bodies] == [batch.batch_id for batch in batches]
    assert batches[-1].number == 1 + sum(sizes[:-1])


def test_a_file_of_preferences_is_cut_into_batches_too() -> None:
    batches = batches_in(b"\n".join([PREFERENCE] * 3), 2)
    bodies = [read_body(batch.body) for batch in batches]
    assert [(len(body.examples), body.beta_of_preferences) for body in bodies] == [(2, 0.1), (1, 0.1)]


def test_ids_of_cut_batches_follow_from_their_content() -> None:
    """A file that is published again has the ids that it had; what it says twice is trained twice."""
    content = lines_of(*({"text": text} for text in ("a", "b", "a", "b", "c")))
    ids = [batch.batch_id for batch in batches_in(content, 2)]
    assert ids == [batch.batch_id for batch in batches_in(content, 2)]
    assert len(set(ids)) == 3
    changed = [batch.batch_id for batch in batches_in(content.replace(b'"c"', b'"d"'), 2)]
    assert [one == other for one, other in zip(ids, changed, strict=True)] == [True, True, False]


def test_what_was_published_before_can_be_under_new_ids() -> None:
    examples, batches = lines_of({"text": "a"}, {"text": "b"}), b'{"id":"x","examples":[{"text":"a"}]}'
    for content, size in ((examples, 1), (batches, None)):
        before = [batch.batch_id for batch in batches_in(content, size, epochs=2)]
        again = [batch.batch_id for batch in batches_in(content, size, epochs=2, salt="new")]
        assert len({*before, *again}) == len(before) + len(again)
        assert [
            json.loads(each.body)["id"] for each in batches_in(content, size, epochs=2, salt="new")
        ] == again


def test_batches_are_signed_and_those_that_name_a_producer_keep_it() -> None:
    named = b'{"id":"b","producer":"the sensor","examples":[{"text":"a"}]}'
    batches = batches_in(BATCH + b"\n" + named, None)
    first, second = signed(batches, 'ann "the\n1st"')
    assert second == batches[1]
    read, before = read_body(first.body), read_body(batches[0].body)
    assert read == before.model_copy(update={"producer": 'ann "the\n1st"'})
    assert (first.number, first.batch_id) == (1, "a")


def test_who_publishes_has_a_name_that_batches_may_have() -> None:
    assert read_body(signed(batches_in(BATCH, None), this_person())[0].body).producer == this_person()
    with pytest.raises(InvalidBatchError, match="--producer has 129 characters, at most 128"):
        signed(batches_in(BATCH, None), "x" * 129)


def test_every_epoch_has_all_examples_in_an_order_and_under_ids_of_its_own() -> None:
    content = lines_of(*({"text": str(number)} for number in range(20)))
    batches = batches_in(content, 6, epochs=3)
    assert batches == batches_in(content, 6, epochs=3)
    assert batches[:4] == batches_in(content, 6)
    assert len({batch.batch_id for batch in batches}) == 12
    texts = [[each["text"] for each in json.loads(batch.body)["examples"]] for batch in batches]
    epochs = [list(chain(*texts[start : start + 4])) for start in (0, 4, 8)]
    assert [sorted(epoch, key=int) for epoch in epochs] == [[str(number) for number in range(20)]] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_whole_batches_come_again_under_ids_of_the_epoch() -> None:
    unnamed = '{"examples": [{"text": "é"}]}'.encode()
    first, second, again, and_again = batches_in(BATCH + b"\n" + unnamed, None, epochs=2)
    assert [first.batch_id, second.batch_id, again.batch_id] == ["a", "", "a-epoch-2"]
    assert and_again == second
    assert read_body(again.body).id == "a-epoch-2"
    assert read_body(again.body).examples == read_body(first.body).examples


def test_an_id_that_grows_too_long_by_its_epoch_is_refused() -> None:
    batch = json.dumps({"id": "a" * MAX_ID_CHARACTERS, "examples": [{"text": "one"}]}).encode()
    with pytest.raises(InvalidBatchError, match="line 1: id"):
        batches_in(batch, None, epochs=2)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (BATCH + b"\n{oops\n", "line 2: not JSON"),
        (b"[1]\n", "line 1: a JSON object is wanted, not list"),
        (b'{"id": 7, "examples": [{"text": "a"}]}\n', "line 1: id: Input should be a valid string"),
        (b'{"id": "seq-1", "examples": [{"text": "a"}]}\n', "line 1: id: ids that begin with 'seq-'"),
        (BATCH + b'\n\n{"examples": []}\n', "line 3: examples: List should have at least 1 item"),
        (BATCH + b'\n{"examples": [{"txt": "a"}]}', r"line 2: examples\.0: has none of the keys"),
        (b'{"text": "a"}\n{"txt": "b"}', "line 2: has none of the keys"),
        (b'{"text": "a"}\n{"prompt": "b"}', "line 2: completion: Field required"),
        (b'{"text": "a"}\n{"text": "b", "id": "x"}', "line 2: id: Extra inputs"),
        (b'{"text": "a"}\n\n' + PREFERENCE, "of the lines 1 and 3 one is a preference: publish them as two"),
        (PREFERENCE + b'\n{"input": {"messages": []}}', "line 2: input.messages: List should have at least"),
        (BATCH + b'\n{"text": "a"}', "line 1 is a batch and line 2 an example"),
        (b'{"text": "a"}\n\n' + BATCH, "line 1 is an example and line 3 a batch"),
        (b"\n \n", "there is no training batch and no example"),
        (b"\xff\xfe", "line 1: not JSON"),
    ],
)
def test_a_wrong_line_is_refused_by_number_and_reason(tmp_path: Path, content: bytes, fault: str) -> None:
    with pytest.raises(InvalidBatchError, match=rf"batches\.jsonl: {fault}"):
        read_batches(write(tmp_path, content))


def test_a_batch_size_for_whole_batches_is_refused() -> None:
    with pytest.raises(InvalidBatchError, match="--batch-size 4 is for examples"):
        batches_in(BATCH, 4)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidBatchError, match=r"nothing\.jsonl"):
        read_batches(tmp_path / "nothing.jsonl")


class FakeBus:
    """Takes batches until `error` is due; holds an id that it has seen."""

    def __init__(self, error: BusError | None = None, max_message_bytes: int = 1 << 20) -> None:
        self.error = error
        self.max_message_bytes = max_message_bytes
        self.taken: list[tuple[str, bytes, str]] = []

    async def publish_durable(self, subject: str, body: bytes, *, message_id: str = "") -> Stored:
        if self.error is not None and self.taken:
            raise self.error
        ids = [seen for _, _, seen in self.taken]
        if message_id in ids:
            return Stored(ids.index(message_id) + 1, is_repeat=True)
        self.taken.append((subject, body, message_id))
        return Stored(len(self.taken), is_repeat=False)


class Teacher:
    """Stands for the bus and a trainer that cannot learn from the text `x`."""

    def __init__(self) -> None:
        self.num_asked = 0

    async def request(self, _: object, message: BatchCheck, *, timeout_s: float) -> BatchChecked:
        self.num_asked += 1
        wrong = [
            place
            for place, each in enumerate(read_body(message.body).examples)
            if each == PlainText(text="x")
        ]
        return BatchChecked(reason="it is an x", example=wrong[0]) if wrong else BatchChecked()


async def test_what_the_model_cannot_learn_from_is_named_by_its_line() -> None:
    examples = batches_in(b"\n" + lines_of(*({"text": each} for each in "abcxe")), 2)
    with pytest.raises(InvalidBatchError, match=r"^line 5: it is an x$"):
        [each async for each in check_batches(Teacher(), examples)]  # type: ignore[arg-type]
    whole = batches_in(BATCH + b"\n" + BATCH.replace(b"one", b"x"), None)
    with pytest.raises(InvalidBatchError, match=r"^line 2: examples\.0: it is an x$"):
        [each async for each in check_batches(Teacher(), whole)]  # type: ignore[arg-type]


async def test_each_line_is_checked_once_however_often_it_is_trained() -> None:
    teacher = Teacher()
    batches = batches_in(lines_of(*({"text": each} for each in "abcde")), 2, epochs=3)
    assert [each async for each in check_batches(teacher, batches)] == batches  # type: ignore[arg-type]
    assert teacher.num_asked == 3


async def test_each_batch_is_published_with_its_id() -> None:
    bus = FakeBus()
    nameless = b'{"examples": [{"text": "b"}]}'
    batches = batches_in(BATCH + b"\n" + nameless, None)
    stored = [each async for each in publish_batches(bus, batches)]
    assert stored == [Stored(1, is_repeat=False), Stored(2, is_repeat=False)]
    assert bus.taken == [(BATCHES, BATCH, "a"), (BATCHES, nameless, "")]


async def test_a_batch_that_the_bus_does_not_take_is_named() -> None:
    bus = FakeBus(MessageTooLargeError("too large"))
    batches = batches_in(BATCH + b"\n\n" + BATCH.replace(b'"a"', b'"b"'), None)
    with pytest.raises(InvalidBatchError, match="line 3 was not accepted: too large"):
        [each async for each in publish_batches(bus, batches)]


async def test_a_batch_that_is_too_large_is_named_before_anything_is_published() -> None:
    bus = FakeBus(max_message_bytes=1000)
    batches = batches_in(lines_of({"text": "a"}, {"text": "b" * 1000}), 1)
    with pytest.raises(InvalidBatchError, match=r"line 2: its batch has 1\d+ bytes, at most 488 can be sent"):
        [each async for each in publish_batches(bus, batches)]
    assert bus.taken == []


def stored(*places: int, is_repeat: bool = False) -> list[Stored]:
    return [Stored(place, is_repeat=is_repeat) for place in places]


@pytest.mark.parametrize(
    ("what", "told"),
    [
        (stored(7), ["1 batch stored, as 7"]),
        (stored(1, 2), ["2 batches stored, as 1 and 2"]),
        (stored(*range(1, 8)), ["7 batches stored, as 1, 2, 3, 4, 5 and 2 more"]),
    ],
)
def test_what_is_stored_is_told_with_its_places(what: list[Stored], told: list[str]) -> None:
    assert outcome(what) == told


def test_what_was_stored_before_is_told_and_what_to_do() -> None:
    new, old = outcome(stored(1, 2, is_repeat=True) + stored(3))
    assert new == "1 batch stored, as 3"
    assert old.startswith("2 batches already stored, as 1 and 2: an id is not taken again for two minutes")
    assert old.endswith("(--again gives new ones)")
    assert len(outcome(stored(1, is_repeat=True))) == 1


def test_the_bundled_batches_are_ones_the_trainer_takes_under_new_ids() -> None:
    data = DemoData.load(num_batches=160, run_id="demo-1", model=EMBEDDED_MODEL, clock=SystemClock())
    bodies = [read_body(batch.body) for batch in data.batches]
    assert [body.id for body in bodies] == [batch.batch_id for batch in data.batches]
    assert all(batch.batch_id.startswith("demo-1-") for batch in data.batches)
    assert len({batch.batch_id for batch in data.batches}) == 160
    assert data.num_batch_tokens > 160 * 100
    trained = "".join(batch.body.decode() for batch in data.batches)
    assert data.prompts and data.held_out and data.has_chat
    assert not any(line in trained for line in data.held_out)
