"""Which weights made which tokens of a sequence."""

from typing import NamedTuple


class VersionRange(NamedTuple):
    """Tokens in a row that one weights version has made, counted from 0 among those of the sequence."""

    version: int
    first_token: int
    last_token: int


def extended(ranges: list[VersionRange], version: int) -> list[VersionRange]:
    """The ranges once that version has made one more token."""
    if not ranges:
        return [VersionRange(version, 0, 0)]
    *before, newest = ranges
    place = newest.last_token + 1
    if newest.version == version:
        return [*before, newest._replace(last_token=place)]
    return [*ranges, VersionRange(version, place, place)]
