"""`lemix train publish`: a file of training batches or examples, with a progress bar."""

from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress

from lemix.bus import open_bus
from lemix.printing import say
from lemix.publishing import BatchLine, publish_batches
from lemix.run_choice import Target
from shared.bus.base import Stored

MAX_SHOWN = 5
"""Places in the stream that are listed."""


async def run_publish(batches: Sequence[BatchLine], target: Target, console: Console) -> None:
    """Publish all batches, and say where they are.

    Raises InvalidBatchError naming the line that could not be published, BusError when no server answers.
    """
    stored: list[Stored] = []
    async with open_bus(target.nats_url) as bus:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            bar = progress.add_task("publishing", total=len(batches))
            async for each in publish_batches(bus, batches):
                stored.append(each)
                progress.advance(bar)
    for line in outcome(stored):
        say(console, f"{target.label}: {line}")


def outcome(stored: Sequence[Stored]) -> list[str]:
    """Lines that tell a person of the batches that were published."""
    new = [each.sequence for each in stored if not each.is_repeat]
    repeated = [each.sequence for each in stored if each.is_repeat]
    lines = [f"{_batches(new)} stored, as {_listed(new)}"] if new else []
    if repeated:
        lines.append(
            f"{_batches(repeated)} already stored, as {_listed(repeated)}: an id is not taken again for two "
            "minutes; publish what you have changed under another id"
        )
    return lines


def _batches(sequences: Sequence[int]) -> str:
    return f"{len(sequences)} {'batch' if len(sequences) == 1 else 'batches'}"


def _listed(sequences: Sequence[int]) -> str:
    """`1`, `1 and 2`, `1, 2 and 3`; of many, the first ones."""
    shown = [str(sequence) for sequence in sequences[:MAX_SHOWN]]
    more = len(sequences) - MAX_SHOWN
    parts = [*shown, f"{more} more"] if more > 0 else shown
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
