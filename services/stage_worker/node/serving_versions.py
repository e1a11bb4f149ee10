"""Which weights version each sequence of a node runs with."""

from collections import Counter
from collections.abc import Iterable

from services.stage_worker.node.sequence import Sequence
from shared.messages.weights import ServingRule


class ServedVersions:
    """Follows the trainer's rule: newest weights, published version, or that of a sequence's begin."""

    def __init__(self) -> None:
        self.published: int | None = None
        """None: every stage serves its newest weights."""
        self._pins = False
        self._last_turn: dict[int | None, int] = {}
        """Number of the last iteration with each version."""
        self._num_running: Counter[int | None] = Counter()
        """Sequences that run, by `Sequence.version`."""

    @property
    def in_use(self) -> set[int]:
        """Kept versions that running sequences need."""
        wanted = {self.resolved(version) for version, count in self._num_running.items() if count}
        return {version for version in wanted if version is not None}

    def restored(self, version: int, rule: ServingRule, running: Iterable[Sequence]) -> None:
        """All stages serve these weights, and keep them unless the rule is `newest`; `running` goes on."""
        self.published = None if rule == "newest" else version
        self._pins = rule == "pinned"
        self._last_turn.clear()
        self._num_running.clear()
        for sequence in running:
            sequence.version = sequence.task.weights_version
            self.begin(sequence)

    def publish(self, version: int) -> None:
        """Serve this version from now on."""
        self.published = version
        self._last_turn = {each: turn for each, turn in self._last_turn.items() if each is not None}

    def begin(self, sequence: Sequence) -> None:
        """A sequence begins, or goes on after a restore."""
        if self._pins:
            sequence.version = self.of(sequence)
        self._num_running[sequence.version] += 1

    def end(self, sequence: Sequence) -> None:
        """A sequence that began is over."""
        self._num_running[sequence.version] -= 1
        if not self._num_running[sequence.version]:
            del self._num_running[sequence.version]

    def of(self, sequence: Sequence) -> int | None:
        """The version that the sequence runs with; None: each stage's newest weights."""
        return self.resolved(sequence.version)

    def resolved(self, version: int | None) -> int | None:
        """The version that sequences of this `Sequence.version` run with."""
        return self.published if version is None else version

    def of_next_iteration(self, ready: Iterable[int | None], number: int) -> int | None:
        """The version of iteration `number`, of those of the ready sequences: they take turns."""
        if self.published is None:
            return None
        versions = dict.fromkeys(map(self.resolved, ready))
        version = min(versions, key=lambda each: self._last_turn.get(each, -1))
        self._last_turn[version] = number
        return version
