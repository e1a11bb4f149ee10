"""`lemix train rejected`: which training batches were rejected, why, and what was in them."""

import sys
from collections.abc import AsyncIterator
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lemix.bus import open_bus
from lemix.status import find_nats_url
from services.trainer.streams import REJECTED_STREAM
from shared.bus.base import Bus
from shared.errors import BusError, ConfigurationError
from shared.messages.training import RejectedBatch

READER = "lemix-train-rejected"
READ_TIMEOUT_S = 10.0


async def run_rejected(sequence: int | None, nats_url: str | None, runs_dir: Path, console: Console) -> None:
    """Show all rejections; or write what was published at `sequence` of the training stream to standard
    output, byte for byte.

    Raises ConfigurationError when it is not there, or no server is known, BusError when none answers.
    """
    async with open_bus(find_nats_url(nats_url, runs_dir)) as bus:
        if sequence is None:
            console.print(await _table(bus))
        else:
            sys.stdout.buffer.write(await content_of(bus, sequence))


async def rejections(bus: Bus) -> AsyncIterator[RejectedBatch]:
    """All that the stream holds now, oldest first. Raises BusError."""
    stream = await bus.ensure_stream(REJECTED_STREAM)
    reader = await bus.read_stream(REJECTED_STREAM.name, reader=READER, after_sequence=0)
    last = stream.first_sequence - 1
    try:
        while last < stream.last_sequence:
            message = await reader.next(timeout_s=READ_TIMEOUT_S)
            if message is None:
                raise BusError(f"{REJECTED_STREAM.name} gave nothing for {READ_TIMEOUT_S:g} s")
            await message.ack()
            last = message.sequence
            yield RejectedBatch.model_validate_json(message.body)
    finally:
        await reader.close()


async def content_of(bus: Bus, sequence: int) -> bytes:
    """Of the batch that was last rejected there. Raises ConfigurationError when it is not kept, BusError."""
    found = [each async for each in rejections(bus) if each.sequence == sequence]
    if not found:
        raise ConfigurationError(f"no batch at sequence {sequence} is known to be rejected")
    content = found[-1].published
    if content is None:
        raise ConfigurationError(
            f"the rejection of batch {found[-1].batch_id} is kept without what was published; "
            f"the training stream may still hold it, at sequence {sequence}"
        )
    return content


async def _table(bus: Bus) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("sequence", "batch", "reason"):
        table.add_column(heading, overflow="fold")
    async for each in rejections(bus):
        table.add_row(str(each.sequence), escape(each.batch_id), escape(each.reason))
    return table
