"""`lemix train publish`: a file of training batches, with a progress bar."""

from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from lemix.bus import open_bus
from lemix.publishing import publish_batches, read_batches
from lemix.run_choice import Target


async def run_publish(file: Path, target: Target, console: Console) -> None:
    """Publish every batch of `file`, and say how many were accepted.

    Raises InvalidBatchError naming the line that could not be published, ConfigurationError when
    no server is known, BusError when none answers.
    """
    batches = read_batches(file)
    sequences: list[int] = []
    async with open_bus(target.nats_url) as bus:
        with Progress(console=console) as progress:
            bar = progress.add_task("publishing", total=len(batches))
            async for sequence in publish_batches(bus, batches):
                sequences.append(sequence)
                progress.advance(bar)
    console.print(_accepted(sequences), highlight=False)


def _accepted(sequences: list[int]) -> str:
    """The stream gives a batch that it already holds the sequence that it has."""
    stored = len(set(sequences))
    repeated = f", {len(sequences) - stored} of them repeated" if stored < len(sequences) else ""
    return f"{len(sequences)} batches accepted{repeated}; stream sequence {max(sequences)}"
