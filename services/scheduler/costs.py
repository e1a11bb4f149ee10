"""The predicted times of ops on stages. Pure: observed times come in."""

from collections.abc import Callable
from statistics import fmean
from typing import Protocol

from shared.errors import ConfigurationError
from shared.messages.events import OpKind
from shared.profiles.fit import Curve, FittedTimes, fitted_times, load_solver
from shared.profiles.profile import Profile
from shared.profiles.times import NO_WORK, Work
from shared.settings import MAX_ITERATION_TOKENS

FALLBACK_FORWARD_ETA_S = 2e-6
FALLBACK_BACKWARD_ETA_S = 1e-6
"""Seconds for each sequence and squared token: the paper's released code, before anything has run."""
QUADRATIC_LENGTHS = (0.5, 2.0)
"""Times the reference length: the paper's etas come from its workload's own tasks, so the points of a profile
that are far from those must not count. Its formula is that wrong elsewhere."""

CORRECTION_WEIGHT = 0.2
"""Weight of the newest observation. On a shared processor 0.2 and 0.3 forecast best of 0.02 to 0.3, because
other work that slows one op down slows the next ones down too."""
CORRECTION_LIMITS = (0.5, 2.0)
"""Times what was expected: an op that was interrupted for seconds says little about the next one."""
LEARNED_SAMPLES = 512
"""Without a profile curves are fitted to so many first observations, at each doubling of their number."""
NOTHING = Curve((0.0,), 0.0)
UNKNOWN_TIMES = FittedTimes(Curve((1e-3,), 1e-4), NOTHING, 0.0, 0.0)
"""1 ms and 0.1 ms for each token, before anything has run: a small model on a processor."""
MEASURED_KINDS: tuple[OpKind, ...] = ("iteration", "forward", "backward")


class Costs(Protocol):
    """Seconds that an op takes on a stage, alone and without waiting."""

    num_stages: int | None
    """None: no profile says. Whoever learns it from the nodes sets it; until then no stage is the last."""
    hop_s: float
    """Seconds from the end of an op on one stage until the next stage can start on its output."""
    max_iteration_tokens: int
    """Rows that stages put into one iteration; learned from the nodes."""

    def iteration_s(self, stage: int, work: Work) -> float: ...

    def forward_s(self, stage: int, work: Work) -> float:
        """Seconds of a training forward; the last stage's includes its backward."""
        ...

    def backward_s(self, stage: int, work: Work) -> float:
        """Seconds of a training backward; 0 on the last stage."""
        ...

    def step_s(self, stage: int) -> float: ...

    def is_settled(self, stage: int, kind: OpKind) -> bool:
        """Whether ops that take longer than it says are the fault of their node, and not of a formula."""
        ...

    def observe(self, stage: int, kind: OpKind, work: Work, elapsed_s: float) -> None:
        """Note that an op took `elapsed_s` on the device."""
        ...


def costs_named(name: str, profile: Profile | None, hop_s: float) -> Costs:
    """`affine` or `quadratic`. Raises ConfigurationError, naming the choices."""
    if name not in COSTS:
        raise ConfigurationError(f"costs {name!r} are not known; choices: {', '.join(COSTS)}")
    return COSTS[name](profile, hop_s)


class QuadraticCosts:
    """The paper's: eta * B * L^2 for B sequences of L tokens, one eta for forwards and one for backwards.

    The etas are the means of a profile's ratios; without a profile each is the first observed ratio. A
    decoding iteration has the same formula, and the optimizer's step costs nothing.
    """

    def __init__(self, profile: Profile | None, hop_s: float) -> None:
        self.num_stages = profile.num_stages if profile else None
        self.hop_s = hop_s
        self.max_iteration_tokens = MAX_ITERATION_TOKENS
        self._forward_eta_s = _mean_eta_s(profile, "iteration") if profile else None
        self._backward_eta_s = _mean_eta_s(profile, "backward") if profile else None

    def iteration_s(self, stage: int, work: Work) -> float:
        return (self._forward_eta_s or FALLBACK_FORWARD_ETA_S) * _squared_tokens(work)

    def forward_s(self, stage: int, work: Work) -> float:
        backward_s = self._any_backward_s(work) if self._is_last(stage) else 0.0
        return self.iteration_s(stage, work) + backward_s

    def backward_s(self, stage: int, work: Work) -> float:
        return 0.0 if self._is_last(stage) else self._any_backward_s(work)

    def step_s(self, stage: int) -> float:
        return 0.0

    def is_settled(self, stage: int, kind: OpKind) -> bool:
        return False

    def observe(self, stage: int, kind: OpKind, work: Work, elapsed_s: float) -> None:
        if kind == "iteration" and self._forward_eta_s is None:
            self._forward_eta_s = elapsed_s / _squared_tokens(work)
        elif kind == "backward" and self._backward_eta_s is None:
            self._backward_eta_s = elapsed_s / _squared_tokens(work)

    def _any_backward_s(self, work: Work) -> float:
        return (self._backward_eta_s or FALLBACK_BACKWARD_ETA_S) * _squared_tokens(work)

    def _is_last(self, stage: int) -> bool:
        return self.num_stages is not None and stage == self.num_stages - 1


class AffineCosts:
    """Curves fitted to a profile. Each is corrected by how much longer recent ops took than it predicts.

    One curve for each stage and kind of op (`shared.profiles.fit`). Without a profile the curves are fitted
    to the first observations, and corrected from then on.
    """

    def __init__(self, profile: Profile | None, hop_s: float) -> None:
        load_solver()  # now, so that the first fit of a run does not hold the scheduler up
        self.num_stages = profile.num_stages if profile else None
        self.hop_s = hop_s
        self.max_iteration_tokens = MAX_ITERATION_TOKENS
        self._curves: dict[tuple[int, OpKind], _CorrectedCurve] = {}
        for stage, measured in enumerate(profile.stages if profile else ()):
            self._curves[stage, "step"] = _CorrectedCurve(_constant(measured.step_s), None)
            for kind in MEASURED_KINDS:
                if (fitted := measured.fitted(kind)) is not None:
                    self._curves[stage, kind] = _CorrectedCurve(fitted, None)

    def iteration_s(self, stage: int, work: Work) -> float:
        return self._curve(stage, "iteration").seconds(work)

    def forward_s(self, stage: int, work: Work) -> float:
        return self._curve(stage, "forward").seconds(work)

    def backward_s(self, stage: int, work: Work) -> float:
        is_last = self.num_stages is not None and stage == self.num_stages - 1
        return 0.0 if is_last else self._curve(stage, "backward").seconds(work)

    def step_s(self, stage: int) -> float:
        return self._curve(stage, "step").seconds(NO_WORK)

    def is_settled(self, stage: int, kind: OpKind) -> bool:
        return self._curve(stage, kind).is_settled

    def observe(self, stage: int, kind: OpKind, work: Work, elapsed_s: float) -> None:
        if elapsed_s > 0:
            self._curve(stage, kind).observe(work, elapsed_s)

    def _curve(self, stage: int, kind: OpKind) -> "_CorrectedCurve":
        curve = self._curves.get((stage, kind))
        if curve is None:
            curve = self._curves[stage, kind] = _CorrectedCurve(UNKNOWN_TIMES, [])
        return curve


class _CorrectedCurve:
    """Learns its shape from samples, where it has a list for them; else only its height."""

    __slots__ = ("_fitted", "_ratio", "_samples")

    def __init__(self, fitted: FittedTimes, samples: list[tuple[Work, float]] | None) -> None:
        self._fitted = fitted
        self._ratio = 1.0
        self._samples = samples

    @property
    def is_settled(self) -> bool:
        """Whether its shape is known."""
        return self._samples is None

    def seconds(self, work: Work) -> float:
        return self._ratio * self._fitted.seconds(work)

    def observe(self, work: Work, elapsed_s: float) -> None:
        if self._samples is not None:
            self._learn(self._samples, work, elapsed_s)
            return
        lowest, highest = CORRECTION_LIMITS
        surprise = min(max(elapsed_s / self.seconds(work), lowest), highest)
        self._ratio *= 1 + CORRECTION_WEIGHT * (surprise - 1)

    def _learn(self, samples: list[tuple[Work, float]], work: Work, elapsed_s: float) -> None:
        samples.append((work, elapsed_s))
        if len(samples).bit_count() == 1:
            self._fitted = fitted_times(samples)
        if len(samples) == LEARNED_SAMPLES:
            self._samples = None


def _constant(seconds: float) -> FittedTimes:
    return FittedTimes(Curve((seconds,), 0.0), NOTHING, 0.0, 0.0)


def _squared_tokens(work: Work) -> float:
    """B * L^2, where all sequences have the mean length."""
    return work.num_tokens**2 / work.num_sequences


def _mean_eta_s(profile: Profile, kind: OpKind) -> float | None:
    """The mean eta; None: the profile has no such op on whole sequences."""
    ratios = [
        point.elapsed_s / _squared_tokens(point.work)
        for stage in profile.stages
        for point in stage.points
        if point.kind == kind and _is_like_a_task(point.work, profile.reference_tokens)
    ]
    return fmean(ratios) if ratios else None


def _is_like_a_task(work: Work, reference_tokens: int) -> bool:
    length = work.num_tokens / work.num_sequences
    is_whole = work.num_pairs == work.num_tokens * (length + 1) / 2
    shortest, longest = QUADRATIC_LENGTHS
    return is_whole and shortest * reference_tokens <= length <= longest * reference_tokens


COSTS: dict[str, Callable[[Profile | None, float], Costs]] = {
    "affine": AffineCosts,
    "quadratic": QuadraticCosts,
}
