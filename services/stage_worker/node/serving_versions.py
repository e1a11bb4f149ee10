"""Which weights version each sequence of a node runs with."""

from collections.abc import Iterable
from collections.abc import Sequence as Many

from services.stage_worker.node.batcher import Sequence
from shared.messages.weights import ServingRule


class ServedVersions:
    """Follows the trainer's rule: newest weights, published version, or that of a sequence's begin."""

    def __init__(self) -> None:
        self.published: int | None = None
        """None: every stage serves its newest weights."""
        self._pins = False
        self._last_turn: dict[int | None, int] = {}
        """Number of the last iteration with each version."""

    def restored(self, version: int, rule: ServingRule) -> None:
        """All stages serve these weights, and keep them unless the rule is `newest`."""
        self.published = None if rule == "newest" else version
        self._pins = rule == "pinned"
        self._last_turn.clear()

    def publish(self, version: int) -> None:
        """Serve this version from now on."""
        self.published = version
        self._last_turn = {each: turn for each, turn in self._last_turn.items() if each is not None}

    def begin(self, sequences: Iterable[Sequence]) -> None:
        """These sequences begin, or go on after a restore."""
        for sequence in sequences if self._pins else ():
            sequence.version = self.of(sequence)

    def of(self, sequence: Sequence) -> int | None:
        """The version that the sequence runs with; None: each stage's newest weights."""
        return self.published if sequence.version is None else sequence.version

    def of_next_iteration(self, ready: Many[Sequence], number: int) -> int | None:
        """The version of iteration `number`, of those of the ready sequences: they take turns."""
        if self.published is None:
            return None
        version = min(dict.fromkeys(map(self.of, ready)), key=lambda each: self._last_turn.get(each, -1))
        self._last_turn[version] = number
        return version
