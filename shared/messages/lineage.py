"""Messages about lineage: which batches a version has learnt, and from whom."""

from shared.messages.base import Message
from shared.messages.bounds import Count

MAX_NAME_CHARACTERS = 128
"""A producer's name, and an example's id, may have so many."""

MAX_SOURCES = 256
"""Examples of a batch, if it names where they come from."""


class ExampleSource(Message):
    """Where one example of a batch comes from, as its publisher says."""

    id: str
    producer: str
    """Who has written it; empty: not told."""
    sha256: str
    """Digest of the example, in hex."""


class LearntBatch(Message):
    """A batch that some weights contain."""

    id: str
    sequence: int
    """Its place in the training stream."""
    producer: str
    """Who has published it, as the batch says; empty: not told."""
    sha256: str
    """Digest of its body as published, in hex."""
    sources: tuple[ExampleSource, ...] = ()
    """Where its examples come from, in their order; empty: not told."""


class LineageEntry(Message):
    """The batches of a version beyond the version before: a line of the lineage file."""

    version: Count
    """Holds `num_before` batches and these."""
    num_before: Count
    older: Count | None
    """The place of the entry that tells of the batches before; None: they are not known, if there are any."""
    batches: tuple[LearntBatch, ...]
    """Oldest first."""


class LineageRequest(Message):
    """Ask for the newest entry of a durable version's lineage. anyone -> trainer.

    Refused with 404 when there is no such version, or when several nodes each have one of their own.
    """

    version: Count
    node: int | None = None
    """None: the only node that has it."""


class VersionLineage(Message):
    """The trainer's answer."""

    node: int
    newest: LineageEntry


class LineageEntryRequest(Message):
    """Ask for an older entry, which another one names. anyone -> trainer.

    Refused with 404 when there is none at that place.
    """

    place: Count
