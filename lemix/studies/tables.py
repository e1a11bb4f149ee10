"""Studies in Markdown. Pure."""

from collections.abc import Iterable, Sequence

from lemix.studies.grid import Section
from lemix.studies.measures import Format, Measure, number, percent
from lemix.studies.rows import BOUND, POLICY, Labels, Row, Spread, distinct, select
from lemix.studies.verdicts import IN_TIME, LEMIX, SLO, TRAINING, Finding, Verdict

MISSED_SHOWN = 60
"""Missed points that one criterion lists; the JSON has all."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def spread(value: Spread | None, form: Format) -> str:
    """`median (low to high)`; the median alone when all runs agree as far as is shown."""
    if value is None:
        return ""
    median, low, high = (form(part) for part in value)
    return median if low == high else f"{median} ({low} to {high})"


def pivot(rows: Sequence[Row], measure: Measure, across: str, down: str = POLICY) -> str:
    """One line a value of `down` (the policy), one column a value of `across`."""
    columns = distinct(rows, across)
    lines = [
        [f"**{name}**" if name == LEMIX else str(name)]
        + [_cell(select(rows, **{down: name, across: column}), measure) for column in columns]
        for name in distinct(rows, down)
    ]
    return table([down, *(str(column) for column in columns)], lines)


def sections_by(
    rows: Sequence[Row], across: str, measures: Iterable[Measure], place: str = ""
) -> list[Section]:
    """One table a measure."""
    return [
        Section(title=f"{measure.title} by {across}{place}", body=pivot(rows, measure, across))
        for measure in measures
    ]


def _cell(rows: Sequence[Row], measure: Measure) -> str:
    return spread(rows[0].metrics.get(measure.metric), measure.form) if rows else ""


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    lines = [
        [
            verdict.criterion,
            _word(verdict),
            f"{len(verdict.findings) - len(verdict.missed)}",
            f"{len(verdict.findings)}",
        ]
        for verdict in verdicts
    ]
    return table(["criterion", "", "points met", "of"], lines)


def _word(verdict: Verdict) -> str:
    if not verdict.findings:
        return "no such point"
    return "met" if verdict.met else "**missed**"


def missed_sections(verdicts: Iterable[Verdict], rows: Sequence[Row]) -> list[Section]:
    """One list a missed criterion: the points, what was reached, what was needed, what nobody can exceed, and
    what each of the two policies paid for its number.
    """
    return [
        Section(title=f"Missed: {verdict.criterion}", body=_missed_table(verdict, rows))
        for verdict in verdicts
        if verdict.missed
    ]


def _missed_table(verdict: Verdict, rows: Sequence[Row]) -> str:
    shown = verdict.missed[:MISSED_SHOWN]
    lines = [
        [
            ", ".join(f"{name} {value}" for name, value in finding.labels.items()),
            number(finding.reached),
            f"{number(finding.needed)} ({finding.against})" if finding.against else number(finding.needed),
            bound_of(finding, select(rows, **{POLICY: BOUND})),
            _cost_of(LEMIX, finding, rows),
            _cost_of(finding.against, finding, rows),
        ]
        for finding in shown
    ]
    text = table(["point", "reached", "needed", "bound", "LeMix", "the other"], lines)
    left = len(verdict.missed) - len(shown)
    return text + (f"\n\nand {left} more." if left else "")


def _cost_of(policy: str, finding: Finding, rows: Sequence[Row]) -> str:
    """The two things that a policy trades against each other, at the finding's point."""
    found = select(rows, **finding.labels, **{POLICY: policy})
    slo, training = (found[0].median(metric) if found else None for metric in (SLO, TRAINING))
    if slo is None or training is None:
        return ""
    return f"{percent(slo)} % in time, {number(training)} training tokens/s"


def bound_of(finding: Finding, bounds: Sequence[Row]) -> str:
    """The bound for all policies, the bound with every request in time, and whether these
    permit what was needed.
    """
    value = bound_value(finding.labels, finding.metric, bounds)
    if value is None:
        return "none of a single point"
    in_time = bound_value(finding.labels, f"{finding.metric}{IN_TIME}", bounds)
    if in_time is None:
        return f"{number(value)}: {'permitted' if _permits(value, finding) else 'forbidden'}"
    word = "permitted" if _permits(in_time, finding) else "permitted if some are late"
    return f"{number(value)}, {number(in_time)} in time: {word if _permits(value, finding) else 'forbidden'}"


def _permits(bound: float, finding: Finding) -> bool:
    """Whether a bound permits a missed point: its number was too low, or too high."""
    is_too_low = finding.reached < finding.needed
    return bound >= finding.needed if is_too_low else bound <= finding.needed


def bound_value(labels: Labels, metric: str, bounds: Sequence[Row]) -> float | None:
    """The number that no policy can exceed at a point; None when no bound is known."""
    found = [row for row in bounds if row.matches(labels)]
    return found[0].median(metric) if found else None
