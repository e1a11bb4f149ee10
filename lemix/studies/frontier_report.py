"""The frontier in tables: the answer of each search, taken from all that was run. Pure."""

from collections.abc import Iterator, Sequence

from lemix.studies.bars import Bars
from lemix.studies.frontier_loads import FrontierLoad, FrontierPlan
from lemix.studies.grid import Report, Section
from lemix.studies.measures import Measure, percent
from lemix.studies.rows import BOUND, POLICY, Point, Row, Spread, contest, distinct, points, select
from lemix.studies.searching import TBT_P99, is_trained
from lemix.studies.tables import pivot, spread, table
from lemix.studies.verdicts import LEMIX, SEPARATE, SLO, Finding, Verdict, baselines
from lemix.studies.while_serving import KEPT

QUESTION = "question"
NODES_ASKED = "nodes"
RATE_ASKED = "rate on four nodes"
RATE = "rate"
TRAINING_NODES = "training_nodes"
IN_TIME_SHARE = "in_time"
LOAD = "load"
FEWEST = "fewest_nodes"
HIGHEST = "highest_rate_per_s"
HELD_OUT = f"held_out_{SLO}"
SAVED_SHARE = 0.6
"""Share of the nodes of Separate's best split."""


def report(rows: Sequence[Row], *, plan: FrontierPlan) -> Report:
    fewest = [row for load in plan.loads for row in fewest_rows(rows, load, plan)]
    highest = [row for load in plan.loads for row in highest_rows(rows, load, plan)]
    return Report(
        sections=[*_saved(fewest, plan), *_highest(highest), *_answers(fewest)],
        verdicts=[saved_over_separate(fewest, plan), never_more(fewest, plan)],
        charts=dict(_bars(fewest, plan)),
        looked_up=fewest,
    )


def fewest_rows(rows: Sequence[Row], load: FrontierLoad, plan: FrontierPlan) -> Iterator[Row]:
    """For each share in time and each policy that got there: what it reached on the fewest nodes. And the
    bound.
    """
    asked = select(rows, **load.labels, **{QUESTION: NODES_ASKED})
    for share in plan.shares:
        for policy in distinct(asked, POLICY):
            tried = select(asked, **{POLICY: policy})
            if policy == BOUND:
                enough = select(tried, **{IN_TIME_SHARE: share})
            else:
                enough = [row for row in tried if _is_enough(row, load, share)]
            if enough:
                best = min(enough, key=_nodes)
                yield _answer(best, load, FEWEST, _nodes(best), **{IN_TIME_SHARE: share})


def highest_rows(rows: Sequence[Row], load: FrontierLoad, plan: FrontierPlan) -> Iterator[Row]:
    """For each policy that kept the objective at any rate: what it reached at the highest one."""
    asked = select(rows, **load.labels, **{QUESTION: RATE_ASKED})
    for policy in distinct(asked, POLICY):
        enough = [row for row in select(asked, **{POLICY: policy}) if _is_enough(row, load, plan.rate_share)]
        if enough:
            best = max(enough, key=lambda row: float(row.labels[RATE]))
            yield _answer(best, load, HIGHEST, float(best.labels[RATE]), **{IN_TIME_SHARE: plan.rate_share})


def _is_enough(row: Row, load: FrontierLoad, share: float) -> bool:
    medians = {name: spread.median for name, spread in row.metrics.items()}
    return load.demand().objective(share).is_served(medians) and is_trained(medians)


def _nodes(row: Row) -> float:
    found = row.median(FEWEST)
    return float(row.labels["nodes"]) if found is None else found


def _answer(row: Row, load: FrontierLoad, metric: str, value: float, **labels: float) -> Row:
    """The row under the names of the question it answers."""
    kept = {name: row.labels[name] for name in (TRAINING_NODES,) if name in row.labels}
    metrics = {**row.metrics, metric: Spread(value, value, value)}
    metrics |= {name: Spread(float(each), float(each), float(each)) for name, each in kept.items()}
    return Row({**load.labels, **labels, POLICY: row.labels[POLICY]}, metrics, row.num_runs)


def _saved(fewest: Sequence[Row], plan: FrontierPlan) -> Iterator[Section]:
    """The headline: nodes by policy, and the ratio to the best of the others."""
    policies = [str(policy) for policy in distinct(fewest, POLICY) if policy not in (LEMIX, BOUND)]
    head = [LOAD, "in time", f"**{LEMIX}**", *policies, BOUND, f"of {SEPARATE}'s", "of the best baseline's"]
    lines = []
    for point in points(fewest):
        ours, theirs = _fewest_of(point, LEMIX), {each: _fewest_of(point, each) for each in policies}
        best = min((nodes for nodes in theirs.values() if nodes is not None), default=None)
        lines.append(
            [
                str(point.labels[LOAD]),
                f"{point.labels[IN_TIME_SHARE]:.0%}",
                _written(ours, plan),
                *(_written(nodes, plan) for nodes in theirs.values()),
                _written(_fewest_of(point, BOUND), plan),
                _ratio(ours, theirs.get(SEPARATE)),
                _ratio(ours, best),
            ]
        )
    if lines:
        yield Section(title="Devices saved: the fewest nodes", body=table(head, lines))


def _bars(fewest: Sequence[Row], plan: FrontierPlan) -> Iterator[tuple[str, Bars]]:
    """The fewest nodes by load, a picture for each share in time."""
    for share in plan.shares:
        at = points(select(fewest, **{IN_TIME_SHARE: share}))
        policies = [policy for policy in distinct(fewest, POLICY) if policy != BOUND]
        if at:
            yield (
                f"nodes-{100 * share:g}",
                Bars(
                    title=f"Fewest nodes with {share:.0%} in time and the training kept up with",
                    x_title="nodes",
                    groups=[str(point.labels[LOAD]).replace("; ", "\n") for point in at],
                    values={
                        str(policy): [_fewest_of(point, str(policy)) for point in at] for policy in policies
                    },
                    most=plan.most_nodes,
                ),
            )


def _fewest_of(point: Point, policy: str) -> float | None:
    return point.by_policy[policy].median(FEWEST) if policy in point.by_policy else None


def _written(nodes: float | None, plan: FrontierPlan) -> str:
    return f"over {plan.most_nodes}" if nodes is None else f"{nodes:g}"


def _ratio(ours: float | None, theirs: float | None) -> str:
    return "" if ours is None or theirs is None else f"{ours / theirs:.2f}"


REACHED = (
    Measure(FEWEST, "nodes", lambda value: f"{value:g}"),
    Measure(TRAINING_NODES, "of them only train", lambda value: f"{value:g}"),
    Measure(SLO, "in time (%)", percent),
    Measure(HELD_OUT, "on held-out seeds", percent),
    Measure(KEPT, "training kept (%)", percent),
    Measure(TBT_P99, "TBT p99 (s)"),
)


def _answers(fewest: Sequence[Row]) -> Iterator[Section]:
    """At each answer: what was reached there."""
    for load in distinct(fewest, LOAD):
        for share in distinct(select(fewest, load=load), IN_TIME_SHARE):
            rows = contest(select(fewest, load=load, **{IN_TIME_SHARE: share}))
            head = [POLICY, *(measure.title for measure in REACHED)]
            lines = [
                [str(row.labels[POLICY]), *(spread(row.metrics.get(m.metric), m.form) for m in REACHED)]
                for row in rows
            ]
            yield Section(title=f"On the fewest nodes for {share:.0%}: {load}", body=table(head, lines))


def _highest(highest: Sequence[Row]) -> Iterator[Section]:
    if highest:
        measure = Measure(HIGHEST, "requests/s")
        share = highest[0].labels[IN_TIME_SHARE]
        body = pivot(highest, measure, POLICY, LOAD)
        yield Section(title=f"Highest rate on four nodes, {share:.0%} in time (requests/s)", body=body)


def saved_over_separate(fewest: Sequence[Row], plan: FrontierPlan) -> Verdict:
    """Where Separate needs more nodes than were tried, it is held to need one more."""
    findings = []
    for point in points(fewest):
        theirs = _fewest_of(point, SEPARATE) or plan.most_nodes + 1
        findings.append(_finding(point, SAVED_SHARE * theirs, SEPARATE, plan))
    return Verdict(f"at most {SAVED_SHARE:g} of the nodes of Separate's best split", tuple(findings))


def never_more(fewest: Sequence[Row], plan: FrontierPlan) -> Verdict:
    findings = []
    for point in points(fewest):
        nodes = {policy: row.median(FEWEST) or 0.0 for policy, row in baselines(point) if policy != BOUND}
        if nodes:
            against = min(nodes, key=lambda policy: nodes[policy])
            findings.append(_finding(point, nodes[against], against, plan))
    return Verdict("never more nodes than a baseline", tuple(findings))


def _finding(point: Point, needed: float, against: str, plan: FrontierPlan) -> Finding:
    ours = _fewest_of(point, LEMIX) or plan.most_nodes + 1.0
    return Finding(point.labels, ours, needed, ours <= needed, against, FEWEST)
