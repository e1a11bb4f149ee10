"""Which weights versions of a node its stages keep, and which one they serve: events in, actions out.

without a guard   kept by a step --applied--> published --no request uses it any more--> released
with a guard      kept by a step --applied--> evaluated --not much worse--> published
                  and saved, or  ------------^          '--worse--> withheld, released
                  kept at rest

Nothing here happens while the newest weights serve.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, isfinite, nan

from services.trainer.publication.losses import Losses
from shared.messages.training import VersionsServed
from shared.messages.weights import ServingRule

REST_S = 60.0
"""Between two attempts to evaluate a version at rest."""


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
    max_samples_rise: float = inf
    """Or when its loss on what the model wrote itself is higher by more nats per token than it was for the
    weights that wrote it.
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
class Keep:
    """Have every stage keep its weights, which are of this version, as nothing trains; answer with `kept`."""

    version: int


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Find this version's losses; answer with `evaluated`."""

    version: int


@dataclass(frozen=True, slots=True)
class Withheld:
    """This version is not served."""

    version: int
    reason: str


PublishingAction = Publish | Release | Keep | Evaluate | Withheld


class Publishing:
    """State of one node. Each method takes what has happened and returns what to do, in order."""

    def __init__(self, rules: PublishingRules) -> None:
        self.published: int | None = None
        """None: the newest weights serve."""
        self.losses: dict[int, Losses] = {}
        """Those of kept versions that were evaluated."""
        self._lowest_loss = inf
        """The lowest held-out loss of all that have served, back to a rollback: rises must not add up."""
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
        self.newest_judged = 0
        """The newest version that was evaluated."""
        self._newest_tried = 0
        """The newest version that was evaluated, or is."""
        self._has_failed = False
        """Something went wrong at rest, and was not tried again yet."""
        self._rests_until_s = -inf
        """When it may be."""

    @property
    def is_guarded(self) -> bool:
        """Whether versions are evaluated before they serve."""
        return self._rules.evaluate_every > 0

    def wants_saved(self, version: int) -> bool:
        """Whether a guard may let it serve, or has: then it must be there after a crash, too."""
        return self.is_guarded and version in self._kept

    def why_withheld(self, version: int) -> str:
        """Why that version must not serve; empty: it may, as far as is known."""
        withheld = self.last_withheld
        return withheld.reason if withheld is not None and withheld.version == version else ""

    def rise(self, held_out: float | None) -> float:
        """How many times the lowest held-out loss of all that have served that is.

        Where that is no number, it is as much as was known of the restored version.
        """
        rise = nan if held_out is None or self._lowest_loss <= 0 else held_out / self._lowest_loss
        return rise if isfinite(rise) else self._restored_rise

    def restored(
        self, version: int, *, rise: float = 1.0, newest_tried: int | None = None
    ) -> list[PublishingAction]:
        """All stages serve this version, and keep no other; `rise`: of its loss, when it was let serve.

        The lowest loss so far is known by that, on whichever examples the version is evaluated now.
        `newest_tried`: the newest version that was evaluated before; None: the one that serves.
        """
        if self._rules.serving == "newest":
            return []
        self.closed()
        self._restored_rise = rise
        self.published, self._kept = version, {version}
        self._next_due = version + self._rules.evaluate_every
        self.newest_judged = self._newest_tried = version if newest_tried is None else newest_tried
        self._has_failed, self._rests_until_s = False, -inf
        if self.last_withheld is not None and self.last_withheld.version > self.newest_judged:
            self.last_withheld = None  # its number comes again with other weights
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
            self._begin_evaluating(version)
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
        self._newest_tried = min(self._newest_tried, version - 1)

    def applied(self, version: int) -> list[PublishingAction]:
        """All stages have stepped to `version`."""
        if version in self._kept:
            return self._evaluate(version) if self.is_guarded else self._publish(version)
        published = self.published
        if published is None or published in self.losses or not (self.is_guarded and self._is_due(version)):
            return []
        self._next_due = version + self._rules.evaluate_every
        return self._evaluate(published)  # there is nothing to compare with: its evaluation failed

    def at_rest(self, version: int, now_s: float) -> list[PublishingAction]:
        """Nothing trains, and the newest version is durable: it is evaluated now, if it was not before.

        What went wrong is tried again after REST_S.
        """
        if self._has_failed:
            self._has_failed, self._rests_until_s = False, now_s + REST_S
        if self.published is None or self._evaluating is not None or now_s < self._rests_until_s:
            return []
        if self.published not in self.losses:
            return self._evaluate(self.published)
        if version <= self._newest_tried or len(self._kept) >= self._rules.max_kept:
            return []
        self._kept.add(version)
        self._begin_evaluating(version)
        return [Keep(version)]

    def kept(self, version: int, is_kept: bool) -> list[PublishingAction]:
        """Every stage was asked to keep that version; `is_kept`: all do."""
        if version != self._evaluating:
            return []
        if is_kept:
            return [Evaluate(version)]
        self._give_up(version)
        return self._release([version])

    def evaluated(self, version: int, losses: Losses | None) -> list[PublishingAction]:
        """The version's losses; None: they could not be found."""
        if version != self._evaluating or self.published is None:
            return []
        if losses is None:
            self._give_up(version)
            return [] if version == self.published else self._release([version])
        self._evaluating = None
        if version != self.published and losses.num_held_out != self.losses[self.published].num_held_out:
            return self._compare_anew(version)
        self.newest_judged = max(self.newest_judged, version)
        self.losses[version] = losses
        if version == self.published:
            self._has_served(losses, rise=self._restored_rise)
            return []
        if reason := self._too_bad(losses):
            self.num_withheld += 1
            self.last_withheld = Withheld(version, reason)
            return [self.last_withheld, *self._release([version])]
        self._has_served(losses)
        return self._publish(version)

    def _compare_anew(self, version: int) -> list[PublishingAction]:
        """The held-out examples are others from now on: what serves is evaluated on them first."""
        assert self.published is not None
        losses = self.losses.pop(self.published)
        self._restored_rise, self._lowest_loss = self.rise(losses.held_out), inf
        self._next_due = version
        self._newest_tried = min(self._newest_tried, version - 1)
        return self._release([version])

    def _give_up(self, version: int) -> None:
        """The evaluation of that version came to nothing; it may be tried again at rest."""
        self._evaluating, self._has_failed = None, True
        self._newest_tried = min(self._newest_tried, max(version - 1, self.newest_judged))

    def _too_bad(self, losses: Losses) -> str:
        """Why a version with these losses must not serve; empty: it may."""
        limit = (1 + self._rules.max_rise) * self._lowest_loss
        if losses.held_out is not None and _exceeds(losses.held_out, limit):
            return f"held-out loss {losses.held_out:.4f} is above {limit:.4f}"
        if _exceeds(losses.samples_rise, self._rules.max_samples_rise):
            return (
                f"its loss on the model's own samples is {losses.samples_rise:.4f} above what it was, more "
                f"than {self._rules.max_samples_rise:g}"
            )
        return ""

    def _has_served(self, losses: Losses, *, rise: float = 1.0) -> None:
        if losses.held_out is not None:
            self._lowest_loss = min(self._lowest_loss, losses.held_out / rise)

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

    def _begin_evaluating(self, version: int) -> None:
        self._evaluating = self._newest_tried = version
        self._next_due = version + self._rules.evaluate_every

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


def _exceeds(loss: float, limit: float) -> bool:
    """Whether it is above the limit, or no number."""
    return not (isfinite(loss) and loss <= limit)
