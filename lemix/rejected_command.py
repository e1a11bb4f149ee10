"""`lemix train rejected`: which training batches were rejected, why, and what was in them."""

from collections.abc import AsyncIterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lemix.bus import open_bus
from lemix.printing import new_table, print_table
from lemix.run_choice import Target
from shared.bus.base import Bus
from shared.errors import ConfigurationError
from shared.messages.training import RejectedBatch
from shared.subjects import REJECTED_STREAM


async def run_rejected(target: Target, console: Console) -> None:
    """Show all rejections. Raises BusError."""
    async with open_bus(target.nats_url, target.nats_users) as bus:
        print_table(console, await rejections_table(bus, target.label))


async def fetch_rejected(target: Target, sequence: int) -> bytes:
    """Fetch the batch as it was published at `sequence` of the training stream, byte for byte.

    Raises ConfigurationError when it is not there, or BusError.
    """
    async with open_bus(target.nats_url, target.nats_users) as bus:
        return await content_of(bus, sequence)


async def rejections(bus: Bus) -> AsyncIterator[RejectedBatch]:
    """All that the stream holds, oldest first. Raises BusError."""
    last = 0
    while (message := await bus.read_stored(REJECTED_STREAM, after_sequence=last)) is not None:
        last = message.sequence
        yield RejectedBatch.model_validate_json(message.body)


async def content_of(bus: Bus, sequence: int) -> bytes:
    """Fetch the content of the batch that was last rejected there.

    Raises ConfigurationError when it is not kept, or BusError."""
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


async def rejections_table(bus: Bus, label: str) -> Table:
    """All rejections; `label` names the run. Raises BusError."""
    table = new_table(f"{label}: rejected batches")
    for heading in ("sequence", "batch", "reason"):
        table.add_column(heading, overflow="fold")
    async for each in rejections(bus):
        table.add_row(str(each.sequence), escape(each.batch_id), escape(each.reason))
    return table
