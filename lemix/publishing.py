"""Training batches from a JSON-lines file to the durable subject."""

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.bus.base import Bus
from shared.errors import BusError, InvalidBatchError
from shared.subjects import BATCHES


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One training batch as it stands in its file."""

    number: int
    """Of the line, from 1."""
    batch_id: str
    """Empty when the batch names none."""
    body: bytes


def read_batches(path: Path) -> list[BatchLine]:
    """Every batch of the file; empty lines are skipped.

    Raises InvalidBatchError, naming the first line that is not a JSON object; whether an object
    is a usable batch is for the trainer to judge.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON strings may hold other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidBatchError(f"cannot read {path}: {error}") from error
    found = [_batch_line(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise InvalidBatchError(f"{path} holds no training batch")
    return found


def _batch_line(path: Path, number: int, line: str) -> BatchLine:
    try:
        batch = json.loads(line)
    except ValueError as error:
        raise InvalidBatchError(f"{path}, line {number}: not JSON: {error}") from error
    if not isinstance(batch, dict):
        raise InvalidBatchError(
            f"{path}, line {number}: a batch is a JSON object, not {type(batch).__name__}"
        )
    batch_id = batch.get("id", "")
    if not isinstance(batch_id, str):
        raise InvalidBatchError(f"{path}, line {number}: id must be a string, not {batch_id!r}")
    return BatchLine(number=number, batch_id=batch_id, body=line.encode())


async def publish_batches(bus: Bus, batches: Sequence[BatchLine]) -> AsyncIterator[int]:
    """Store one batch after the other; yields the stream sequence of each.

    A batch with an id is stored once, however often it is published. Raises InvalidBatchError
    naming the line that the bus did not take.
    """
    for batch in batches:
        try:
            yield await bus.publish_durable(BATCHES, batch.body, message_id=batch.batch_id)
        except BusError as error:
            raise InvalidBatchError(f"line {batch.number} was not accepted: {error}") from error
