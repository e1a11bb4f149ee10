from pathlib import Path

import pytest

from lemix.demo_data import DemoData
from lemix.publishing import BatchLine, publish_batches, read_batches
from services.trainer.data import read_body
from shared.clock import SystemClock
from shared.errors import BusError, InvalidBatchError, MessageTooLargeError
from shared.settings import EMBEDDED_MODEL
from shared.subjects import BATCHES


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "batches.jsonl"
    path.write_bytes(content)
    return path


def test_lines_are_read_as_they_stand_and_empty_ones_skipped(tmp_path: Path) -> None:
    path = write(tmp_path, '{"id": "a", "x":  1}\n\n{"text": "é\u2028 "}\r\n'.encode())
    assert read_batches(path) == [
        BatchLine(number=1, batch_id="a", body=b'{"id": "a", "x":  1}'),
        BatchLine(number=3, batch_id="", body='{"text": "é\u2028 "}'.encode()),
    ]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b'{"id": "a"}\n{oops\n', "line 2: not JSON"),
        (b"[1]\n", "line 1: a batch is a JSON object, not list"),
        (b'{"id": 7}\n', "line 1: id must be a string, not 7"),
        (b"\n \n", "holds no training batch"),
        (b"\xff\xfe", "cannot read"),
    ],
)
def test_a_file_that_is_not_json_lines_is_refused_naming_the_line(
    tmp_path: Path, content: bytes, fault: str
) -> None:
    with pytest.raises(InvalidBatchError, match=fault):
        read_batches(write(tmp_path, content))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidBatchError, match=r"nothing\.jsonl"):
        read_batches(tmp_path / "nothing.jsonl")


class FakeBus:
    """Takes batches until `error` is due."""

    def __init__(self, error: BusError | None = None) -> None:
        self.error = error
        self.taken: list[tuple[str, bytes, str]] = []

    async def publish_durable(self, subject: str, body: bytes, *, message_id: str = "") -> int:
        if self.error is not None and self.taken:
            raise self.error
        self.taken.append((subject, body, message_id))
        return len(self.taken)


async def test_each_batch_is_published_with_its_id(tmp_path: Path) -> None:
    bus = FakeBus()
    batches = read_batches(write(tmp_path, b'{"id": "a"}\n{"x": 1}'))
    assert [sequence async for sequence in publish_batches(bus, batches)] == [1, 2]
    assert bus.taken == [(BATCHES, b'{"id": "a"}', "a"), (BATCHES, b'{"x": 1}', "")]


async def test_a_batch_that_the_bus_does_not_take_is_named(tmp_path: Path) -> None:
    bus = FakeBus(MessageTooLargeError("too large"))
    batches = read_batches(write(tmp_path, b'{"id": "a"}\n\n{"id": "b"}'))
    with pytest.raises(InvalidBatchError, match="line 3 was not accepted: too large"):
        [sequence async for sequence in publish_batches(bus, batches)]


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
