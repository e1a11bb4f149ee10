"""The report of the learning study: our losses, with the paper's beside them."""

from collections.abc import Iterable, Sequence

from lemix.studies import paper
from lemix.studies.charts import Chart, Line, Panel, panel
from lemix.studies.grid import Report, Section
from lemix.studies.learning_metrics import BATCHES_SERVED, LOSS, NUM_PARTS, part_metric
from lemix.studies.measures import NODES_USED, Measure
from lemix.studies.rows import POLICY, Point, Row, Spread, distinct, points, select
from lemix.studies.tables import pivot
from lemix.studies.verdicts import (
    PAPERS_SEPARATE,
    Finding,
    Verdict,
    all_applied,
    lemix_value,
    ratio_verdict,
)

PARALLELISM = "parallelism"
TRAINING_RATE = "training_rate"
OF_THE_PAPER = ("S-PP", "DP")
"""Those whose losses the paper draws."""
MIDDLE = 0.5
"""The training rate of the curves over time."""
BASELINES = ("separate", "round_robin", "least_loaded")
ANSWERED = "answered (%)"

INFERENCE_LOSS = Measure(LOSS, "inference loss (nats a token)", lambda value: f"{value:.2f}")
OVER_SEPARATE = Measure(LOSS, "inference loss / Separate's", lambda value: f"{value:.2f}")
SERVED = Measure(BATCHES_SERVED, "batches in the weights that answer")


def report(rows: Sequence[Row]) -> Report:
    return Report(
        sections=list(_sections(rows)),
        verdicts=list(_verdicts(rows)),
        charts={"by-training_rate": by_training_rate(rows), "over-time": over_time(rows)},
    )


def _sections(rows: Sequence[Row]) -> Iterable[Section]:
    for name in distinct(rows, PARALLELISM):
        ours = select(rows, **{PARALLELISM: name})
        shown = [*ours, *paper_rows(str(name), ours)]
        for measure, of in ((INFERENCE_LOSS, shown), (OVER_SEPARATE, over_separate(shown))):
            yield _table(measure, of, TRAINING_RATE, str(name))
        for measure in (SERVED, NODES_USED):
            yield _table(measure, ours, TRAINING_RATE, str(name))
        yield _table(INFERENCE_LOSS, by_part(ours), ANSWERED, f"{name}, {TRAINING_RATE} {MIDDLE}")


def _table(measure: Measure, rows: Sequence[Row], across: str, place: str) -> Section:
    return Section(title=f"{measure.title} by {across}: {place}", body=pivot(rows, measure, across))


def _verdicts(rows: Sequence[Row]) -> Iterable[Verdict]:
    at = points(rows)
    for name in distinct(rows, PARALLELISM):
        for family in BASELINES:
            yield ratio_verdict(at, LOSS, 1.0, {PARALLELISM: name}, family)
    yield best_ratio(at)
    yield all_applied(at)


def best_ratio(at: Iterable[Point]) -> Verdict:
    """One finding: the point at which LeMix's loss is the smallest share of Separate's."""
    criterion = f"best ratio of inference loss to {PAPERS_SEPARATE} at most {paper.HEADLINE_LOSS}"
    ratios = [
        (ours / theirs, point.labels)
        for point in at
        if (ours := lemix_value(point, LOSS)) is not None
        and PAPERS_SEPARATE in point.by_policy
        and (theirs := point.by_policy[PAPERS_SEPARATE].median(LOSS)) is not None
    ]
    if not ratios:
        return Verdict(criterion, ())
    ratio, labels = min(ratios, key=lambda found: found[0])
    bar = paper.HEADLINE_LOSS
    return Verdict(criterion, (Finding(labels, ratio, bar, ratio <= bar, PAPERS_SEPARATE, "ratio"),))


def paper_rows(parallelism: str, rows: Sequence[Row]) -> list[Row]:
    """The paper's losses at the training rates of ours, as rows of policies of their own."""
    rates = distinct(rows, TRAINING_RATE)
    return [
        Row(
            {PARALLELISM: parallelism, TRAINING_RATE: rate, POLICY: f"paper: {policy} ({model})"},
            {LOSS: Spread(loss, loss, loss)},
            0,
        )
        for (of, policy, model), losses in paper.LOSS_BY_TRAINING_RATE.items()
        for rate, loss in zip(paper.TRAINING_RATES, losses, strict=True)
        if of == parallelism and rate in rates
    ]


def over_separate(rows: Sequence[Row]) -> list[Row]:
    """Median losses as shares of Separate's at the same training rate: ours of ours, the paper's of the
    same model's.
    """
    found = []
    for row in rows:
        base = select(rows, **{TRAINING_RATE: row.labels[TRAINING_RATE], POLICY: _separate_of(row)})
        ours, theirs = row.median(LOSS), base[0].median(LOSS) if base else None
        if ours is not None and theirs is not None and base[0] is not row:
            ratio = ours / theirs
            found.append(Row(row.labels, {LOSS: Spread(ratio, ratio, ratio)}, row.num_runs))
    return found


def _separate_of(row: Row) -> str:
    policy = str(row.labels[POLICY])
    _, is_of_a_model, model = policy.partition(" (")
    return f"paper: separate ({model}" if is_of_a_model else PAPERS_SEPARATE


def by_part(rows: Sequence[Row]) -> list[Row]:
    """The losses of each part of the requests at the middle training rate."""
    return [
        Row(
            {PARALLELISM: row.labels[PARALLELISM], ANSWERED: percent, POLICY: row.labels[POLICY]},
            {LOSS: row.metrics[part_metric(number)]},
            row.num_runs,
        )
        for row in select(rows, **{TRAINING_RATE: MIDDLE})
        for number in range(NUM_PARTS)
        if part_metric(number) in row.metrics
        for percent in [100 * (number + 1) // NUM_PARTS]
    ]


def by_training_rate(rows: Sequence[Row]) -> Chart:
    """A row a parallelism: our panel, and one for each of the paper's models."""
    names = [str(name) for name in distinct(rows, PARALLELISM) if name in OF_THE_PAPER]
    return Chart(
        x_title=TRAINING_RATE,
        y_titles=[INFERENCE_LOSS.title for _ in names],
        panels=[
            [
                panel(select(rows, **{PARALLELISM: name}), name, INFERENCE_LOSS, TRAINING_RATE),
                *(_paper_panel(name, model) for model in paper.MODELS),
            ]
            for name in names
        ],
    )


def _paper_panel(parallelism: str, model: str) -> Panel:
    lines = [
        Line(
            name=_our_name(policy),
            points=[
                (rate, Spread(loss, loss, loss))
                for rate, loss in zip(paper.TRAINING_RATES, losses, strict=True)
            ],
        )
        for (of, policy, of_model), losses in paper.LOSS_BY_TRAINING_RATE.items()
        if (of, of_model) == (parallelism, model)
    ]
    return Panel(title=f"paper: {parallelism}, {model}", lines=lines)


def _our_name(policy: str) -> str:
    """The label that a policy of the paper has in our rows, so that both are drawn alike."""
    return PAPERS_SEPARATE if policy == "separate" else policy


def over_time(rows: Sequence[Row]) -> Chart:
    """A panel a parallelism, and one with what is known of the paper's."""
    of_parts = by_part(rows)
    known = [
        Line(name=_our_name(policy), points=[(at, Spread(*losses)) for at, losses in by_percent.items()])
        for policy, by_percent in paper.LOSS_OVER_TIME.items()
    ]
    ours = [
        panel(select(of_parts, **{PARALLELISM: name}), str(name), INFERENCE_LOSS, ANSWERED)
        for name in distinct(of_parts, PARALLELISM)
    ]
    return Chart(
        x_title=f"{ANSWERED}, at training rate {MIDDLE}",
        y_titles=[INFERENCE_LOSS.title],
        panels=[[*ours, Panel(title="paper: Llama2-7B (% of the run)", lines=known)]],
    )
