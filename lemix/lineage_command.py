"""`lemix lineage`: which batches a version has learnt, and who has published them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console

from lemix.bus import open_bus
from lemix.printing import say
from lemix.run_choice import Target
from shared import checkpoints, lineage
from shared.checkpoints import GIVEN_VERSION
from shared.errors import NoResponderError
from shared.messages.lineage import (
    ExampleSource,
    LearntBatch,
    LineageEntry,
    LineageEntryRequest,
    LineageRequest,
)
from shared.subjects import LINEAGE, LINEAGE_ENTRY

TIMEOUT_S = 30.0
"""One question may take so long."""
HASH_CHARACTERS = 12
"""People are shown so much of a digest."""
NOT_TOLD = "not told"


@dataclass(frozen=True, slots=True)
class WholeLineage:
    """All that is known of what a version has learnt."""

    node: int | None
    """None: of the model as it was given, which is that of every node."""
    version: int
    num_unknown: int
    """Batches of which nothing is known: the version's first."""
    batches: tuple[LearntBatch, ...]
    """The others, oldest first."""

    @classmethod
    def of(cls, node: int | None, entries: Sequence[LineageEntry]) -> "WholeLineage":
        """`entries`: newest first, down to the oldest that is known."""
        batches = tuple(batch for entry in reversed(entries) for batch in entry.batches)
        return cls(node, entries[0].version, entries[-1].num_before, batches)


GIVEN = WholeLineage(node=None, version=GIVEN_VERSION, num_unknown=0, batches=())


async def fetch_lineage(target: Target, version: int, node: int | None) -> WholeLineage:
    """Ask the trainer of a running cluster. Raises BusError, RefusedError with the reason among them."""
    if version == GIVEN_VERSION:
        return GIVEN
    async with open_bus(target.nats_url, target.nats_users) as bus:
        try:
            asked = LineageRequest(version=version, node=node)
            found = await bus.request(LINEAGE.at(), asked, timeout_s=TIMEOUT_S)
        except NoResponderError:
            raise NoResponderError("NATS answers, but no trainer is connected to it") from None
        entries = [found.newest]
        while (place := entries[-1].older) is not None:
            entry = LineageEntryRequest(place=place)
            entries.append(await bus.request(LINEAGE_ENTRY.at(), entry, timeout_s=TIMEOUT_S))
    return WholeLineage.of(found.node, entries)


def read_lineage(root: Path, version: int, node: int | None) -> WholeLineage:
    """Read the files of a run that is not running. Raises ConfigurationError."""
    if version == GIVEN_VERSION:
        return GIVEN
    manifest = checkpoints.find(root, version, node).manifest
    entries = [lineage.newest_entry(root, manifest)]
    while (place := entries[-1].older) is not None:
        entries.append(lineage.read_entry(root, place))
    return WholeLineage.of(manifest.node, entries)


def show_lineage(found: WholeLineage, label: str, console: Console) -> None:
    """One line a batch, newest last; `label` names the run."""
    for line in _lines(found, label):
        say(console, line)


def _lines(found: WholeLineage, label: str) -> Iterator[str]:
    if found.node is None:
        yield f"{label}: version {found.version} is the model as it was given, and has learnt nothing"
        return
    batches = "batch" if found.version == 1 else "batches"
    yield f"{label}, node {found.node}: version {found.version} has learnt {found.version} {batches}"
    if found.num_unknown:
        yield f"1 to {found.num_unknown}: unknown, learnt before lineages were kept"
    for number, batch in enumerate(found.batches, start=found.num_unknown + 1):
        yield f"{number}: {_described(batch)}"


def _described(batch: LearntBatch) -> str:
    told = f"{batch.id}, message {batch.sequence}, from {batch.producer or NOT_TOLD}, {_hash(batch.sha256)}"
    return f"{told}: {'; '.join(map(_source, batch.sources))}" if batch.sources else told


def _source(source: ExampleSource) -> str:
    return f"{source.id} from {source.producer or NOT_TOLD}, {_hash(source.sha256)}"


def _hash(sha256: str) -> str:
    return f"sha256 {sha256[:HASH_CHARACTERS]}"


def json_of(found: WholeLineage) -> str:
    """All of it, as one JSON object."""
    content = {
        "node": found.node,
        "version": found.version,
        "num_unknown": found.num_unknown,
        "batches": found.batches,
    }
    return msgspec.json.format(msgspec.json.encode(content), indent=1).decode()
