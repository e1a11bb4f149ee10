"""A file of training batches, or of examples to be cut into batches, to the durable subject."""

import getpass
import hashlib
import json
import os
import random
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic_core import from_json

from services.trainer.intake.data import check_id, read_body
from shared.bus.base import Bus, Stored
from shared.errors import BusError, InvalidBatchError
from shared.examples import AnyExample, Preference, numbered_lines, read_example
from shared.messages.lineage import MAX_NAME_CHARACTERS
from shared.messages.training import BatchCheck, BatchChecked
from shared.subjects import BATCHES, TRAIN_CHECK

STANDARD_INPUT = Path("-")
DEFAULT_BATCH_SIZE = 8
"""Examples of a batch, where a file holds examples."""
CHECK_TIMEOUT_S = 30.0
"""The trainer reads batches one after the other, and may be busy with a large one."""
HEADERS_BYTES = 512
"""More than the headers of a batch's message take."""


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One training batch of a file."""

    number: int
    """The number of its line, or of its first example's line, from 1."""
    batch_id: str
    """Empty when the batch names none."""
    body: bytes
    lines: tuple[int, ...] = ()
    """The numbers of its examples' lines; empty: the batch is a line of its own."""


def read_batches(
    file: Path, batch_size: int | None = None, *, epochs: int = 1, salt: str = ""
) -> list[BatchLine]:
    """The batches in `file`, as `batches_in` finds them; `-` is standard input.

    Raises InvalidBatchError, naming the file and the first line that is wrong.
    """
    name = "standard input" if file == STANDARD_INPUT else str(file)
    try:
        content = sys.stdin.buffer.read() if file == STANDARD_INPUT else file.read_bytes()
    except OSError as error:
        raise InvalidBatchError(f"cannot read {name}: {error}") from error
    try:
        return batches_in(content, batch_size, epochs=epochs, salt=salt)
    except InvalidBatchError as error:
        raise InvalidBatchError(f"{name}: {error}") from error


def batches_in(content: bytes, batch_size: int | None, *, epochs: int = 1, salt: str = "") -> list[BatchLine]:
    """One batch a line; or one example a line, cut into batches of `batch_size` in the order of the file.

    All comes `epochs` times; examples in another order from the second time on, always the same. With a
    `salt` ids are others, so that what was trained or rolled back before is trained again.

    Raises InvalidBatchError, naming the first line that is wrong, or that is of another kind than the first.
    """
    lines = list(numbered_lines(content))
    if not lines:
        raise InvalidBatchError("there is no training batch and no example in it")
    holds_batches = _is_batch(*lines[0])
    if holds_batches and batch_size is not None:
        raise InvalidBatchError(f"--batch-size {batch_size} is for examples, and this holds whole batches")
    for number, line in lines:
        if _is_batch(number, line) != holds_batches:
            kinds = ("a batch", "an example") if holds_batches else ("an example", "a batch")
            raise InvalidBatchError(
                f"line {lines[0][0]} is {kinds[0]} and line {number} {kinds[1]}: publish them as two files"
            )
    if holds_batches:
        batches = [_read_batch(number, line) for number, line in lines]
        if salt:
            batches = [_under_id(batch, salt) for batch in batches]
        later = [_under_id(batch, f"epoch-{epoch}") for epoch in range(2, epochs + 1) for batch in batches]
        return batches + later
    _check_examples(lines)
    orders = [lines, *(_shuffled(lines, epoch) for epoch in range(2, epochs + 1))]
    return list(_cut(orders, batch_size or DEFAULT_BATCH_SIZE, salt))


def _is_batch(number: int, line: bytes) -> bool:
    try:
        content = from_json(line)
    except ValueError as error:
        raise InvalidBatchError(f"line {number}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidBatchError(f"line {number}: a JSON object is wanted, not {type(content).__name__}")
    return "examples" in content


def _read_batch(number: int, line: bytes) -> BatchLine:
    try:
        batch_id = read_body(line).id or ""
        check_id(batch_id)
    except InvalidBatchError as error:
        raise InvalidBatchError(f"line {number}: {error}") from error
    return BatchLine(number=number, batch_id=batch_id, body=line)


def _check_examples(lines: Sequence[tuple[int, bytes]]) -> None:
    """Raises InvalidBatchError, naming the first line that is wrong, or of another kind than the first."""
    first, *_ = are_preferences = [isinstance(_read_example(*line), Preference) for line in lines]
    if len(set(are_preferences)) > 1:
        other = lines[are_preferences.index(not first)][0]
        raise InvalidBatchError(
            f"of the lines {lines[0][0]} and {other} one is a preference: publish them as two files"
        )


def _read_example(number: int, line: bytes) -> AnyExample:
    try:
        return read_example(line)
    except InvalidBatchError as error:
        raise InvalidBatchError(f"line {number}: {error}") from error


def _under_id(batch: BatchLine, ending: str) -> BatchLine:
    """The batch under an id with that ending; without an id it is new each time."""
    if not batch.batch_id:
        return batch
    batch_id = f"{batch.batch_id}-{ending}"
    body = json.dumps({**from_json(batch.body), "id": batch_id}, ensure_ascii=False).encode()
    return _read_batch(batch.number, body)


def _shuffled(lines: Sequence[tuple[int, bytes]], epoch: int) -> Sequence[tuple[int, bytes]]:
    return random.Random(epoch).sample(lines, len(lines))


def _cut(orders: Iterable[Sequence[tuple[int, bytes]]], batch_size: int, salt: str) -> Iterator[BatchLine]:
    """Cut the lines of each epoch into batches.

    Ids are made of the content, so that a file that is published again is not trained again; what a file
    itself repeats is trained as often as it stands there.
    """
    num_seen: Counter[bytes] = Counter()
    for lines in orders:
        for start in range(0, len(lines), batch_size):
            numbers, contents = zip(*lines[start : start + batch_size], strict=True)
            examples = b",".join(contents)
            num_seen[examples] += 1
            batch_id = hashlib.sha256(b"%d %b%b" % (num_seen[examples], examples, salt.encode())).hexdigest()[
                :32
            ]
            body = b'{"id":%b,"examples":[%b]}' % (json.dumps(batch_id).encode(), examples)
            yield BatchLine(number=numbers[0], batch_id=batch_id, body=body, lines=numbers)


def this_person() -> str:
    """Who runs this, and where: `user@host`."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # in containers, a number may be all that there is
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"[:MAX_NAME_CHARACTERS]


def signed(batches: Sequence[BatchLine], producer: str) -> list[BatchLine]:
    """The batches with their producer; those that name one keep it.

    Raises InvalidBatchError when the name is too long.
    """
    if len(producer) > MAX_NAME_CHARACTERS:
        raise InvalidBatchError(
            f"--producer has {len(producer)} characters, at most {MAX_NAME_CHARACTERS} are allowed"
        )
    head = b'{"producer":%b,' % json.dumps(producer).encode()
    return [
        batch if "producer" in from_json(batch.body) else replace(batch, body=head + batch.body[1:])
        for batch in batches
    ]


async def check_batches(bus: Bus, batches: Sequence[BatchLine]) -> AsyncIterator[BatchLine]:
    """Have the trainer check every line once, before anything is published; yields the batches that it took.

    Raises InvalidBatchError naming the first line that the model cannot learn from, BusError when no trainer
    answers.
    """
    checked: set[int] = set()
    for batch in batches:
        lines = batch.lines or (batch.number,)
        if not checked.issuperset(lines):
            answer = await bus.request(
                TRAIN_CHECK.at(), BatchCheck(body=batch.body), timeout_s=CHECK_TIMEOUT_S
            )
            if answer.reason:
                raise InvalidBatchError(_fault(batch, answer))
            checked.update(lines)
        yield batch


def _fault(batch: BatchLine, answer: BatchChecked) -> str:
    if answer.example is None:
        return f"line {batch.number}: {answer.reason}"
    if not batch.lines:
        return f"line {batch.number}: examples.{answer.example}: {answer.reason}"
    return f"line {batch.lines[answer.example]}: {answer.reason}"


async def publish_batches(bus: Bus, batches: Sequence[BatchLine]) -> AsyncIterator[Stored]:
    """Store one batch after the other; yields where each is.

    A batch with an id is stored once, however often it is published. Raises InvalidBatchError naming the line
    that the bus did not take; when one is too large, nothing is published.
    """
    limit = bus.max_message_bytes - HEADERS_BYTES
    for batch in batches:
        if len(batch.body) > limit:
            raise InvalidBatchError(
                f"line {batch.number}: its batch has {len(batch.body)} bytes, at most {limit} can be sent: "
                "make it smaller (--batch-size)"
            )
    for batch in batches:
        try:
            yield await bus.publish_durable(BATCHES, batch.body, message_id=batch.batch_id)
        except BusError as error:
            raise InvalidBatchError(f"line {batch.number} was not accepted: {error}") from error
