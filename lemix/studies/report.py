"""The files of a study: NAME.md, NAME.json and its figures."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lemix.studies.charts import draw
from lemix.studies.grid import Cell, Report, Section, Study
from lemix.studies.rows import Row, Spread
from lemix.studies.tables import missed_sections, verdict_table
from lemix.studies.verdicts import Verdict


def write(study: Study, rows: Sequence[Row], folder: Path, *, command: str, made: str) -> Path:
    """Write the study's files under `folder`; returns the Markdown's path."""
    folder.mkdir(parents=True, exist_ok=True)
    report = study.report(rows)
    names = [f"{study.name}-{suffix}.png" for suffix in report.charts]
    for name, chart in zip(names, report.charts.values(), strict=True):
        draw(chart, folder / name)
    names += [_draw_timeline(study, cell, folder) for cell in study.timelines]
    (folder / f"{study.name}.json").write_text(_as_json(study, rows, report, command, made))
    path = folder / f"{study.name}.md"
    path.write_text(_as_markdown(study, rows, report, names, _setting(study, rows, command, made)))
    return path


def _draw_timeline(study: Study, cell: Cell, folder: Path) -> str:
    from lemix.simulation.run import simulate
    from lemix.simulation.timeline_figure import draw_timeline

    record, _ = simulate(cell.cluster, cell.workload)
    name = f"{study.name}-timeline-{cell.policy.replace(':', '-').replace('=', '-')}.png"
    draw_timeline(record, folder / name)
    return name


def _as_markdown(
    study: Study, rows: Sequence[Row], report: Report, figures: Iterable[str], setting: str
) -> str:
    pictures = "\n\n".join(f"![{name}]({name})" for name in figures)
    sections = [
        *([Section(title="Verdicts", body=verdict_table(report.verdicts))] if report.verdicts else []),
        *report.sections,
        *missed_sections(report.verdicts, report.looked_up or rows),
        *([Section(title="Figures", body=pictures)] if pictures else []),
        Section(title="Setting", body=setting),
    ]
    parts = [f"# {study.title}", study.about, *(f"## {part.title}\n\n{part.body}" for part in sections)]
    return "\n\n".join(parts) + "\n"


def _setting(study: Study, rows: Sequence[Row], command: str, made: str) -> str:
    seeds = sorted({cell.cluster.seed for cell in study.cells})
    return (
        f"Made by `{command}`. Seeds {', '.join(map(str, seeds))};"
        f" {sum(row.num_runs for row in rows)} of {len(study.cells)} runs."
        " A number is the median over the seeds, with the lowest and the highest behind it where they differ."
        " All times but those of a real cluster are virtual: no machine made them longer or shorter."
        f" {made}"
    )


def _as_json(study: Study, rows: Sequence[Row], report: Report, command: str, made: str) -> str:
    """The rows one a line, so that a change of one is a change of one line."""
    head = {
        "study": study.name,
        "command": command,
        "made": made,
        "verdicts": [_verdict(verdict) for verdict in report.verdicts],
    }
    lines = ",\n".join(json.dumps(_row(row)) for row in rows)
    return f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n]\n}}\n'


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "criterion": verdict.criterion,
        "met": verdict.met if verdict.findings else None,
        "points": len(verdict.findings),
        "missed": [asdict(finding) for finding in verdict.missed],
    }


def _row(row: Row) -> dict[str, Any]:
    """Each metric as [median, lowest, highest], or as one number where the runs agree."""
    return {
        "labels": dict(row.labels),
        "runs": row.num_runs,
        "metrics": {name: _spread(spread) for name, spread in row.metrics.items()},
    }


def _spread(spread: Spread) -> list[float] | float:
    parts = [_short(part) for part in spread]
    return parts[0] if len(set(parts)) == 1 else parts


def _short(value: float) -> float:
    """Six significant digits: more than a run means."""
    return float(f"{value:.6g}")
