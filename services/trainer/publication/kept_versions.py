"""The weights versions that a node's stages keep, and what each is for. Pure."""

from collections.abc import Collection, Iterable
from typing import Literal

VersionState = Literal["candidate", "serving", "retired"]


class KeptVersions:
    """How a version fares that is kept:

    candidate --approved--> serving --another is--> retired --no request uses it--> gone
         '-- withheld, or its step is not made --> gone
    """

    def __init__(self) -> None:
        self._states: dict[int, VersionState] = {}

    def __contains__(self, version: int) -> bool:
        return version in self._states

    def __len__(self) -> int:
        return len(self._states)

    @property
    def serving(self) -> int | None:
        """The version that new requests get; None: the newest weights."""
        return next((version for version, state in self._states.items() if state == "serving"), None)

    def add(self, version: int) -> None:
        """Note that stages keep that version, or soon will: its step is ordered."""
        self._states[version] = "candidate"

    def serve(self, version: int) -> None:
        """Note that that version serves, in the place of the one that did."""
        if self.serving is not None:
            self._states[self.serving] = "retired"
        self._states[version] = "serving"

    def unused(self, in_use: Collection[int]) -> list[int]:
        """Retired versions that no request uses any more."""
        retired = (version for version, state in self._states.items() if state == "retired")
        return sorted(version for version in retired if version not in in_use)

    def drop(self, versions: Iterable[int]) -> None:
        """Note that stages keep these no longer."""
        for version in versions:
            self._states.pop(version, None)

    def drop_from(self, version: int) -> None:
        """Note that neither this step nor a later one is made."""
        self.drop([kept for kept in self._states if kept >= version])

    def clear(self) -> None:
        """Note that it is not known what stages keep."""
        self._states.clear()
