"""Which weights made which tokens of a sequence."""

from itertools import pairwise
from typing import NamedTuple


class VersionRange(NamedTuple):
    """Tokens in a row that one weights version has made, counted from 0 among those of the sequence."""

    version: int
    first_token: int
    last_token: int


class TokenVersions:
    """The versions of a sequence's tokens, as these come: most have that of the one before."""

    def __init__(self) -> None:
        self._begun: list[tuple[int, int]] = []
        """Each version, and the first token of it in a row."""
        self._num_tokens = 0

    def add(self, version: int) -> None:
        """That version has made one more token."""
        if not self._begun or self._begun[-1][0] != version:
            self._begun.append((version, self._num_tokens))
        self._num_tokens += 1

    @property
    def ranges(self) -> tuple[VersionRange, ...]:
        """The ranges of all tokens so far, in order."""
        ends = [*self._begun, (0, self._num_tokens)]
        return tuple(VersionRange(version, first, end - 1) for (version, first), (_, end) in pairwise(ends))
