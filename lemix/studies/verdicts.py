"""Whether LeMix does what issue 3 asks of it, criterion by criterion and point by point. Pure.

A baseline is every policy but `lemix`, in every configuration; what is compared are medians over the seeds.
A criterion that speaks of Separate (Mix-RR) means the best of all configurations of `separate`
(`round_robin`) at that point, by the metric in question.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lemix.studies import paper
from lemix.studies.rows import BOUND, Labels, Point, Row

LEMIX = "lemix"
SEPARATE = "separate"
PAPERS_SEPARATE = "separate:split=training_rate"
"""Its configuration in the paper."""
SLO = "slo_attainment"
THROUGHPUT = "tasks_per_node_s"
GOODPUT = "goodput_per_s"
TRAINING = "training_tokens_per_s"
APPLIED = "batches_applied_share"
IN_TIME = "_in_time"
"""End of the name of a bound for runs that serve every request in time."""
FORECAST_ERRORS = ("forward_error", "response_error")

SLO_TOLERANCE = 0.01
SEPARATE_IS_WEAK_BELOW = 0.45
GOODPUT_RATIO = 0.98
TRAINING_RATIO = 0.9
RR_MEETS_ITS_SLO = 0.90
FORECAST_ERROR = 0.05
SAME_SLO = 0.001
"""With tolerance: so much more attainment counts as higher ..."""
SAME_TRAINING = 0.005
"""... and so much more training, as a share."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One point held against one criterion."""

    labels: Labels
    reached: float
    needed: float
    met: bool
    against: str
    """The policy that `needed` comes from."""
    metric: str
    """The metric of both numbers; a bound is looked up by it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One criterion over a grid."""

    criterion: str
    findings: tuple[Finding, ...]

    @property
    def missed(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if not finding.met)

    @property
    def met(self) -> bool:
        return not self.missed


def best(point: Point, metric: str, family: str = "") -> tuple[str, float] | None:
    """The baseline that is highest in `metric`, of those whose names begin with `family`; None: no such."""
    found = [
        (policy, value)
        for policy, row in baselines(point, family)
        if (value := row.median(metric)) is not None
    ]
    return max(found, key=lambda pair: pair[1], default=None)


def baselines(point: Point, family: str = "") -> list[tuple[str, Row]]:
    return [
        (policy, row)
        for policy, row in point.by_policy.items()
        if policy != LEMIX and policy.startswith(family)
    ]


def at_least(
    points: Iterable[Point],
    criterion: str,
    metric: str,
    family: str,
    needed: Callable[[float], float],
    applies: Callable[[Point], bool] = lambda point: True,
) -> Verdict:
    """LeMix's `metric` at least `needed` of the best baseline's, wherever both exist and it `applies`."""
    findings = []
    for point in points:
        ours, theirs = lemix_value(point, metric), best(point, metric, family)
        if ours is None or theirs is None or not applies(point):
            continue
        bar = needed(theirs[1])
        findings.append(Finding(point.labels, ours, bar, ours >= bar, theirs[0], metric))
    return Verdict(criterion, tuple(findings))


def lemix_value(point: Point, metric: str) -> float | None:
    row = point.by_policy.get(LEMIX)
    return None if row is None else row.median(metric)


def slo_near_best(points: Iterable[Point]) -> Verdict:
    return at_least(
        points,
        "SLO attainment at most 1 percentage point below the best baseline's",
        SLO,
        "",
        lambda best_share: best_share - SLO_TOLERANCE,
    )


def slo_over_weak_separate(points: Sequence[Point], family: str = SEPARATE) -> Verdict:
    highest = max((float(point.labels["training_rate"]) for point in points), default=0.0)

    def applies(point: Point) -> bool:
        separate = best(point, SLO, family)
        at_highest = point.labels["training_rate"] == highest
        return at_highest and separate is not None and separate[1] < SEPARATE_IS_WEAK_BELOW

    return at_least(
        points,
        f"SLO attainment at least {paper.HEADLINE_SLO} times that of {family} at training rate {highest:g}"
        f" where that is below {SEPARATE_IS_WEAK_BELOW:.0%}",
        SLO,
        family,
        lambda share: paper.HEADLINE_SLO * share,
        applies,
    )


def throughput_over_separate(points: Iterable[Point], family: str = SEPARATE) -> Verdict:
    criterion = f"tasks per node-second at least those of {family}"
    return at_least(points, criterion, THROUGHPUT, family, lambda theirs: theirs)


def best_throughput_ratio(points: Iterable[Point], family: str = SEPARATE) -> Verdict:
    """One finding: the grid point at which the ratio to the family is highest."""
    ratios = [
        (ours / theirs[1], theirs[0], point.labels)
        for point in points
        if (ours := lemix_value(point, THROUGHPUT)) is not None
        and (theirs := best(point, THROUGHPUT, family)) is not None
    ]
    criterion = f"best ratio of tasks per node-second to {family} at least {paper.HEADLINE_THROUGHPUT}"
    if not ratios:
        return Verdict(criterion, ())
    ratio, against, labels = max(ratios, key=lambda found: found[0])
    bar = paper.HEADLINE_THROUGHPUT
    return Verdict(criterion, (Finding(labels, ratio, bar, ratio >= bar, against, "ratio"),))


def possible_throughput_ratio(points: Iterable[Point], bound: str, family: str = SEPARATE) -> float | None:
    """The highest ratio to the family's best tasks per node-second that any policy can reach on a grid
    whose points have the policy `bound`; None without such a point. `bound` names its metric.
    """
    ratios = [
        most / theirs[1]
        for point in points
        if BOUND in point.by_policy
        and (most := point.by_policy[BOUND].median(bound)) is not None
        and (theirs := best(point, THROUGHPUT, family)) is not None
    ]
    return max(ratios, default=None)


def goodput_near_round_robin(points: Iterable[Point]) -> Verdict:
    return at_least(
        points,
        f"goodput at least {GOODPUT_RATIO:g} of Mix-RR's",
        GOODPUT,
        "round_robin",
        lambda theirs: GOODPUT_RATIO * theirs,
    )


def training_near_round_robin(points: Iterable[Point]) -> Verdict:
    def applies(point: Point) -> bool:
        slo = best(point, SLO, "round_robin")
        return slo is not None and slo[1] >= RR_MEETS_ITS_SLO

    return at_least(
        points,
        f"training tokens/s at least {TRAINING_RATIO:g} of Mix-RR's where that meets {RR_MEETS_ITS_SLO:.0%}",
        TRAINING,
        "round_robin",
        lambda theirs: TRAINING_RATIO * theirs,
        applies,
    )


def undominated(points: Iterable[Point], *, slo_margin: float = 0.0, training_margin: float = 0.0) -> Verdict:
    """One finding a point: the dominating baseline that exceeds LeMix's SLO attainment most, if there is
    one.
    """
    findings = []
    for point in points:
        slo, training = lemix_value(point, SLO), lemix_value(point, TRAINING)
        if slo is None or training is None:
            continue
        above = [
            (their_slo, policy)
            for policy, row in baselines(point)
            if (their_slo := row.median(SLO)) is not None
            and (theirs := row.median(TRAINING)) is not None
            and their_slo > slo + slo_margin
            and theirs > training * (1 + training_margin)
        ]
        needed, against = max(above, default=(slo, ""))
        findings.append(Finding(point.labels, slo, needed, not above, against, SLO))
    margins = f" (by more than {slo_margin:.1%} and {training_margin:.1%})" if slo_margin else ""
    return Verdict(
        f"no baseline higher in both SLO attainment and training tokens/s{margins}", tuple(findings)
    )


def all_applied(points: Iterable[Point]) -> Verdict:
    """Check every policy in every run."""
    findings = [
        Finding(point.labels, spread.low, 1.0, spread.low >= 1.0, policy, APPLIED)
        for point in points
        for policy, row in point.by_policy.items()
        if (spread := row.metrics.get(APPLIED)) is not None
    ]
    return Verdict("every accepted training batch is applied in the end (all policies)", tuple(findings))


def forecast_error(points: Iterable[Point], metric: str, what: str) -> Verdict:
    findings = [
        Finding(point.labels, error, FORECAST_ERROR, error <= FORECAST_ERROR, LEMIX, metric)
        for point in points
        if (error := lemix_value(point, metric)) is not None
    ]
    return Verdict(f"forecast error {what} at most {FORECAST_ERROR:.0%}", tuple(findings))


def main_verdicts(points: Sequence[Point]) -> list[Verdict]:
    """Every criterion of the main grid; those of Separate also against its configuration in the paper."""
    return [
        slo_near_best(points),
        slo_over_weak_separate(points),
        throughput_over_separate(points),
        best_throughput_ratio(points),
        goodput_near_round_robin(points),
        undominated(points),
        undominated(points, slo_margin=SAME_SLO, training_margin=SAME_TRAINING),
        training_near_round_robin(points),
        all_applied(points),
        forecast_error(points, FORECAST_ERRORS[0], "of forwards"),
        forecast_error(points, FORECAST_ERRORS[1], "of response times"),
        slo_over_weak_separate(points, PAPERS_SEPARATE),
        throughput_over_separate(points, PAPERS_SEPARATE),
        best_throughput_ratio(points, PAPERS_SEPARATE),
    ]


def ratio_verdict(
    points: Iterable[Point], metric: str, most: float, where: Labels, family: str = "separate"
) -> Verdict:
    """LeMix's `metric` (lower is better) at most `most` times the lowest of the family's, at the points
    `where`.
    """
    findings = []
    for point in points:
        theirs = [
            (value, policy)
            for policy, row in baselines(point, family)
            if (value := row.median(metric)) is not None
        ]
        ours = lemix_value(point, metric)
        if (
            ours is None
            or not theirs
            or any(point.labels.get(name) != value for name, value in where.items())
        ):
            continue
        lowest, against = min(theirs)
        findings.append(Finding(point.labels, ours, most * lowest, ours <= most * lowest, against, metric))
    place = ", ".join(f"{name} {value}" for name, value in where.items())
    return Verdict(f"{metric} at most {most:g} of {family}'s at {place}", tuple(findings))
