"""Which checkpoints of a node are kept. Pure."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from shared import checkpoints
from shared.checkpoints import GIVEN_VERSION, Checkpoint


@dataclass(frozen=True, slots=True)
class Retention:
    """How many checkpoints there are to go back to, and how far back: two for each age at most."""

    newest: int
    """So many of the newest ones are kept."""
    ages_s: tuple[float, ...] = ()
    """There is a checkpoint to go back to that is at least this old, and at most about twice as old."""

    def dispensable(
        self, found: Sequence[Checkpoint], *, now_wall_s: float, undecided: Collection[int] = ()
    ) -> list[Checkpoint]:
        """The checkpoints of a node, newest first, that nothing needs.

        Beside those for a way back, the newest that may serve is needed, versions of which a guard is
        `undecided` whether they may, and version 0.
        """
        serving = checkpoints.serving(found)
        needed = {GIVEN_VERSION, *undecided, *self._way_back(found, now_wall_s)}
        return [
            each
            for each in found[self.newest :]
            if each is not serving and each.manifest.version not in needed
        ]

    def _way_back(self, found: Sequence[Checkpoint], now_wall_s: float) -> Iterator[int]:
        """For each age the newest version that is as old, and the oldest that is younger: it takes the place
        of the other once it is old enough.
        """
        for age_s in self.ages_s:
            created_before_s = now_wall_s - age_s
            old = [each for each in found if each.manifest.created_wall_s <= created_before_s]
            young = [each for each in found if each.manifest.created_wall_s > created_before_s]
            yield from (each.manifest.version for each in [*old[:1], *young[-1:]])
