"""The profiles of nodes that are not alike, as a person writes them. Pure."""

import re
from collections.abc import Iterable, Mapping

from shared.errors import ConfigurationError

_WRITTEN = re.compile(r"(?P<first>\d+)(?:-(?P<last>\d+))?=(?P<profile>.+)")


def profiles_by_node(written: Iterable[str]) -> Mapping[int, str]:
    """Read `NODE=PROFILE` and `FIRST-LAST=PROFILE`. Raises ConfigurationError with the text."""
    profiles: dict[int, str] = {}
    for text in written:
        found = _WRITTEN.fullmatch(text)
        if found is None:
            raise ConfigurationError(
                f"node profile {text!r} is not of the form NODE=PROFILE or FIRST-LAST=PROFILE"
            )
        first = int(found["first"])
        nodes = range(first, int(found["last"] or first) + 1)
        if not nodes or profiles.keys() & set(nodes):
            raise ConfigurationError(f"node profile {text!r}: no node, or one that has a profile already")
        profiles.update(dict.fromkeys(nodes, found["profile"]))
    return profiles
