"""Which weights versions of a node its stages keep, and which one they serve: events in, actions out.

without a guard   kept by a step --applied--> published --no request uses it any more--> released
with a guard      kept by a step --applied--> evaluated --not much worse--> published
                  and saved, or  ------------^          '--worse--> withheld, released
                  kept at rest

Nothing here happens while the newest weights serve.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from services.trainer.publication.evaluation_turns import EvaluationTurns
from services.trainer.publication.kept_versions import KeptVersions
from services.trainer.publication.loss_limits import LossLimits
from services.trainer.publication.losses import Losses
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
        self.losses: dict[int, Losses] = {}
        """Those of kept versions that were evaluated."""
        self.limits = LossLimits(max_rise=rules.max_rise, max_samples_rise=rules.max_samples_rise)
        self.num_withheld = 0
        """Versions withheld in the trainer's life so far."""
        self.last_withheld: Withheld | None = None
        self.turns = EvaluationTurns(rules.evaluate_every)
        self._rules = rules
        self._kept = KeptVersions()

    @property
    def published(self) -> int | None:
        """The version that serves; None: the newest weights do."""
        return self._kept.serving

    @property
    def is_guarded(self) -> bool:
        """Whether versions are evaluated before they serve."""
        return self._rules.evaluate_every > 0

    def wants_saved(self, version: int) -> bool:
        """Whether a guard may approve it, or has: then it must be there after a crash, too."""
        return self.is_guarded and version in self._kept

    def why_withheld(self, version: int) -> str:
        """Why that version must not serve; empty: it may, as far as is known."""
        withheld = self.last_withheld
        return withheld.reason if withheld is not None and withheld.version == version else ""

    def restored(
        self, version: int, *, rise: float = 1.0, newest_tried: int | None = None
    ) -> list[PublishingAction]:
        """All stages serve this version, and keep no other; `rise`: of its loss, when it was approved.

        The lowest loss so far is known by that, on whichever examples the version is evaluated now.
        `newest_tried`: the newest version that was evaluated before; None: the one that serves.
        """
        if self._rules.serving == "newest":
            return []
        self.closed()
        self.limits.restart(rise)
        self._kept.serve(version)
        self.turns.restart(version, newest_tried=version if newest_tried is None else newest_tried)
        if self.last_withheld is not None and self.last_withheld.version > self.turns.newest_judged:
            self.last_withheld = None  # its number comes again with other weights
        return self._evaluate(version) if self.is_guarded else []

    def closed(self) -> None:
        """Whatever stages do next, it is not what this state tells of."""
        self.turns.evaluating = None
        self._kept.clear()
        self.losses.clear()
        self.limits.restart()

    def begin_keeping(self, version: int) -> bool:
        """A step to `version` is being ordered, or a merge: returns whether stages shall keep it."""
        if self.published is None or version in self._kept or len(self._kept) >= self._rules.max_kept:
            return False
        if self.is_guarded:
            if not self.turns.is_due(version) or self.published not in self.losses:
                return False
            self.turns.begin(version)
        self._kept.add(version)
        return True

    def may_keep_later(self, version: int) -> bool:
        """Whether `begin_keeping` may agree to that version when its gradients are there, if not now."""
        return self.published is not None and not (self.is_guarded and version < self.turns.next_due)

    def revoke_from(self, version: int) -> None:
        """The orders to step to that version, and to later ones, do not hold."""
        self._kept.drop_from(version)
        self.turns.revoke_from(version)

    def applied(self, version: int) -> list[PublishingAction]:
        """All stages have stepped to `version`."""
        if version in self._kept:
            return self._evaluate(version) if self.is_guarded else self._publish(version)
        published = self.published
        if not self.is_guarded or published is None or published in self.losses:
            return []
        if not self.turns.is_due(version):
            return []
        self.turns.pass_over(version)
        return self._evaluate(published)  # there is nothing to compare with: its evaluation failed

    def at_rest(self, version: int, now_s: float) -> list[PublishingAction]:
        """Nothing trains, and the newest version is durable: it is evaluated now, if it was not before.

        What went wrong is tried again after REST_S.
        """
        if self.published is None or not self.turns.may_begin_at_rest(now_s):
            return []
        if self.published not in self.losses:
            return self._evaluate(self.published)
        if version <= self.turns.newest_tried or len(self._kept) >= self._rules.max_kept:
            return []
        self._kept.add(version)
        self.turns.begin(version)
        return [Keep(version)]

    def kept(self, version: int, is_kept: bool) -> list[PublishingAction]:
        """Every stage was asked to keep that version; `is_kept`: all do."""
        if version != self.turns.evaluating:
            return []
        if is_kept:
            return [Evaluate(version)]
        self.turns.give_up(version)
        return self._release([version])

    def evaluated(self, version: int, losses: Losses | None) -> list[PublishingAction]:
        """The version's losses; None: they could not be found."""
        if version != self.turns.evaluating or self.published is None:
            return []
        if losses is None:
            self.turns.give_up(version)
            return [] if version == self.published else self._release([version])
        self.turns.evaluating = None
        if version != self.published and losses.num_held_out != self.losses[self.published].num_held_out:
            return self._compare_anew(version)
        self.turns.judged(version)
        self.losses[version] = losses
        if version == self.published:
            self.limits.restored(losses)
            return []
        if reason := self.limits.why_too_bad(losses):
            self.num_withheld += 1
            self.last_withheld = Withheld(version, reason)
            return [self.last_withheld, *self._release([version])]
        self.limits.served(losses)
        return self._publish(version)

    def _compare_anew(self, version: int) -> list[PublishingAction]:
        """The held-out examples are others from now on: what serves is evaluated on them first."""
        assert self.published is not None
        losses = self.losses.pop(self.published)
        self.limits.restart(self.limits.rise(losses.held_out))
        self.turns.postpone(version)
        return self._release([version])

    def served(self, event: VersionsServed) -> list[PublishingAction]:
        """Stage 0 tells what it serves."""
        if self.published is None:
            return []
        if event.published != self.published:
            return [Publish(self.published)]  # once more: it may have been lost
        return self._release(self._kept.unused(event.in_use))

    def _evaluate(self, version: int) -> list[PublishingAction]:
        self.turns.evaluating = version
        return [Evaluate(version)]

    def _publish(self, version: int) -> list[PublishingAction]:
        self._kept.serve(version)
        return [Publish(version)]

    def _release(self, versions: Sequence[int]) -> list[PublishingAction]:
        self._kept.drop(versions)
        for version in versions:
            self.losses.pop(version, None)
        return [Release(version) for version in versions]
