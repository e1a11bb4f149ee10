"""Which weights versions of a node its stages keep, and which one they serve: events in, actions out.

without a guard   kept by a step --applied--> published --no request uses it any more--> released
with a guard      kept by a step --applied--> evaluated --not much worse--> published
                  and saved                             '--worse--> withheld, released

Nothing here happens while the newest weights serve.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, isfinite, nan

from shared.messages.training import VersionsServed
from shared.messages.weights import ServingRule


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishingRules:
    """The rules for every node."""

    serving: ServingRule = "newest"
    max_kept: int = 2
    """Versions that stages keep at once; while all are in use, no newer one is published."""
    evaluate_every: int = 0
    """Steps from one version that is evaluated to the next; 0: every kept version is published unseen."""
    max_rise: float = 0.05
    """A version is withheld when its held-out loss is higher by more than this share than the lowest of those
    that have served.
    """


@dataclass(frozen=True, slots=True)
class Publish:
    """Have stage 0 serve this version."""

    version: int


@dataclass(frozen=True, slots=True)
class Release:
    """No stage needs to keep this version."""

    version: int


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Find this version's loss on the held-out examples; answer with `evaluated`."""

    version: int


@dataclass(frozen=True, slots=True)
class Withheld:
    """This version is not served: its held-out loss is above the limit."""

    version: int
    loss: float
    limit: float


PublishingAction = Publish | Release | Evaluate | Withheld


class Publishing:
    """State of one node. Each method takes what has happened and returns what to do, in order."""

    def __init__(self, rules: PublishingRules) -> None:
        self.published: int | None = None
        """None: the newest weights serve."""
        self.losses: dict[int, float] = {}
        """Losses on the held-out examples, for kept versions that were evaluated."""
        self._lowest_loss = inf
        """The lowest loss of all that have served, back to a rollback: small rises must not add up."""
        self._restored_rise = 1.0
        """See `rise`: of the restored version, when it was let serve."""
        self.num_withheld = 0
        """Versions withheld in the trainer's life so far."""
        self.last_withheld: Withheld | None = None
        self._rules = rules
        self._kept: set[int] = set()
        """Versions that the stages keep, or soon will: their step is ordered."""
        self._evaluating: int | None = None
        """The version that is evaluated now, or as soon as its step is done."""
        self._next_due = 0

    @property
    def is_guarded(self) -> bool:
        """Whether versions are evaluated before they serve."""
        return self._rules.evaluate_every > 0

    def wants_saved(self, version: int) -> bool:
        """Whether a guard may let it serve, or has: then it must be there after a crash, too."""
        return self.is_guarded and version in self._kept

    def rise(self, loss: float) -> float:
        """How many times the lowest loss of all that have served that is; where that is no number, as much as
        was known of the restored version.
        """
        rise = loss / self._lowest_loss if self._lowest_loss > 0 else nan
        return rise if isfinite(rise) else self._restored_rise

    def restored(self, version: int, *, rise: float = 1.0) -> list[PublishingAction]:
        """All stages serve this version, and keep no other; `rise`: of its loss, when it was let serve.

        The lowest loss so far is known by that, on whichever examples the version is evaluated now.
        """
        if self._rules.serving == "newest":
            return []
        self.closed()
        self._restored_rise = rise
        self.published, self._kept = version, {version}
        self._next_due = version + self._rules.evaluate_every
        return self._evaluate(version) if self.is_guarded else []

    def closed(self) -> None:
        """Whatever stages do next, it is not what this state tells of."""
        self.published = self._evaluating = None
        self._kept.clear()
        self.losses.clear()
        self._lowest_loss, self._restored_rise = inf, 1.0

    def begin_keeping(self, version: int) -> bool:
        """A step to `version` is being ordered, or a merge: returns whether stages shall keep it."""
        if self.published is None or version in self._kept or len(self._kept) >= self._rules.max_kept:
            return False
        if self.is_guarded:
            if not self._is_due(version) or self.published not in self.losses:
                return False
            self._evaluating = version
            self._next_due = version + self._rules.evaluate_every
        self._kept.add(version)
        return True

    def may_keep_later(self, version: int) -> bool:
        """Whether `begin_keeping` may agree to that version when its gradients are there, if not now."""
        return self.published is not None and not (self.is_guarded and version < self._next_due)

    def revoke_from(self, version: int) -> None:
        """The orders to step to that version, and to later ones, do not hold."""
        self._kept = {kept for kept in self._kept if kept < version}
        if self._evaluating is not None and self._evaluating >= version:
            self._next_due, self._evaluating = self._evaluating, None

    def applied(self, version: int) -> list[PublishingAction]:
        """All stages have stepped to `version`."""
        if version in self._kept:
            return self._evaluate(version) if self.is_guarded else self._publish(version)
        published = self.published
        if published is None or published in self.losses or not (self.is_guarded and self._is_due(version)):
            return []
        self._next_due = version + self._rules.evaluate_every
        return self._evaluate(published)  # there is nothing to compare with: its evaluation failed

    def evaluated(self, version: int, loss: float | None) -> list[PublishingAction]:
        """The mean loss per learnt token of the held-out examples; None: it could not be found."""
        if version != self._evaluating or self.published is None:
            return []
        self._evaluating = None
        if loss is None:
            return [] if version == self.published else self._release([version])
        self.losses[version] = loss
        if version == self.published:
            self._lowest_loss = min(self._lowest_loss, loss / self._restored_rise)
            return []
        limit = (1 + self._rules.max_rise) * self._lowest_loss
        if isfinite(loss) and loss <= limit:
            self._lowest_loss = min(self._lowest_loss, loss)
            return self._publish(version)
        self.num_withheld += 1
        self.last_withheld = Withheld(version, loss, limit)
        return [self.last_withheld, *self._release([version])]

    def served(self, event: VersionsServed) -> list[PublishingAction]:
        """Stage 0 tells what it serves."""
        if self.published is None:
            return []
        if event.published != self.published:
            return [Publish(self.published)]  # once more: it may have been lost
        return self._release(
            version
            for version in sorted(self._kept)
            if version < self.published and version not in event.in_use
        )

    def _is_due(self, version: int) -> bool:
        return self._evaluating is None and version >= self._next_due

    def _evaluate(self, version: int) -> list[PublishingAction]:
        self._evaluating = version
        return [Evaluate(version)]

    def _publish(self, version: int) -> list[PublishingAction]:
        self.published = version
        return [Publish(version)]

    def _release(self, versions: Iterable[int]) -> list[PublishingAction]:
        released = list(versions)
        self._kept.difference_update(released)
        for version in released:
            self.losses.pop(version, None)
        return [Release(version) for version in released]
