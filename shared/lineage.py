"""The lineage file of a run: which batches each durable version contains, and who has published them.

    <root>/lineage.jsonl    one entry a line, each of which names the place of the one before it

The manifest of a checkpoint names the place of its newest entry; from there on the way back is told. Nothing
in the file is ever changed: an entry whose checkpoint was never made, or was rolled back, is one that nothing
names any more.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from shared.checkpoints import GIVEN_VERSION, Manifest
from shared.disk import sync
from shared.errors import ConfigurationError
from shared.messages.lineage import MAX_SOURCES, LearntBatch, LineageEntry

FILE_NAME = "lineage.jsonl"
MAX_BATCHES = 64
"""An entry has no more, and none after they name MAX_SOURCES examples: it fits into a message."""

_ENTRY = msgspec.json.Decoder(LineageEntry)


def append(root: Path, batches: Sequence[LearntBatch], *, num_before: int, older: int | None) -> int | None:
    """Write down what a checkpoint contains beyond the one before it; returns the place of the newest entry.

    `num_before`: batches in that one; `older`: its newest entry. Raises OSError; what was written then counts
    for nothing.
    """
    if not batches:
        return older
    path = root / FILE_NAME
    is_new = not path.exists()
    with path.open("ab", buffering=0) as file:
        for some in _parts(batches):
            version = num_before + len(some)
            entry = LineageEntry(version=version, num_before=num_before, older=older, batches=some)
            line = msgspec.json.encode(entry) + b"\n"
            if file.write(line) != len(line):
                raise OSError(f"the disk has no room for {path}")
            # Whoever else appends meanwhile: the position is that of the end of this line.
            older, num_before = file.tell() - len(line), version
        os.fsync(file.fileno())
    if is_new:
        sync(root)
    return older


def _parts(batches: Sequence[LearntBatch]) -> Iterator[tuple[LearntBatch, ...]]:
    """Cut the batches into those of one entry each."""
    part: list[LearntBatch] = []
    for batch in batches:
        part.append(batch)
        if len(part) == MAX_BATCHES or sum(len(each.sources) for each in part) >= MAX_SOURCES:
            yield tuple(part)
            part = []
    if part:
        yield tuple(part)


def newest_entry(root: Path, manifest: Manifest) -> LineageEntry:
    """The newest entry of the lineage of a checkpoint; one without batches when it has learnt none, or when
    it was made before lineages were kept.

    Raises ConfigurationError when the file is damaged.
    """
    version, place = manifest.version, manifest.lineage_entry
    if version == GIVEN_VERSION or place is None:
        return LineageEntry(version=version, num_before=version, older=None, batches=())
    entry = read_entry(root, place)
    if entry.version != version:
        raise _damaged(root, f"the entry at {place} is not that of version {version}")
    return entry


def read_entry(root: Path, place: int) -> LineageEntry:
    """The entry at that place of the file. Raises ConfigurationError when there is none."""
    try:
        with (root / FILE_NAME).open("rb") as file:
            file.seek(place)
            entry = _ENTRY.decode(file.readline())
    except (OSError, msgspec.DecodeError, msgspec.ValidationError) as error:
        raise _damaged(root, f"there is no entry at {place}: {error}") from error
    if entry.older is not None and entry.older >= place:
        raise _damaged(root, f"the entry at {place} says that an older one is at {entry.older}")
    return entry


def _damaged(root: Path, reason: str) -> ConfigurationError:
    return ConfigurationError(f"{root / FILE_NAME} is damaged: {reason}")
