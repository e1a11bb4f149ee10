"""The figures of studies: lines with ranges, in panels."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lemix.studies.measures import Measure
from lemix.studies.rows import POLICY, Row, Spread, distinct, select
from lemix.studies.verdicts import LEMIX

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_INCHES = (3.0, 2.3)
DOTS_PER_INCH = 90
COLOURS_PER_FILE = 64
WIDE = 10
"""Where the largest x is above so many times the smallest, the axis is logarithmic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One series of a panel."""

    name: str
    points: Sequence[tuple[float, Spread]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    title: str
    lines: Sequence[Line]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Rows of panels; the panels of a row share what is measured."""

    x_title: str
    y_titles: Sequence[str]
    """By row."""
    panels: Sequence[Sequence[Panel]]
    """By row, then column."""


def chart_by(
    rows: Sequence[Row], across: str, measures: Sequence[Measure], columns: str = "", words: str = ""
) -> Chart:
    """A row of panels a measure; a column a value of the label `columns`, if one is named."""
    values = distinct(rows, columns) if columns else [""]
    panels = [
        [
            panel(select(rows, **({columns: value} if columns else {})), str(value), measure, across)
            for value in values
        ]
        for measure in measures
    ]
    return Chart(x_title=across + words, y_titles=[measure.title for measure in measures], panels=panels)


def panel(rows: Sequence[Row], title: str, measure: Measure, x: str) -> Panel:
    """One line a policy, over the label `x`."""
    lines = [
        Line(name=str(policy), points=_points(select(rows, **{POLICY: policy}), measure, x))
        for policy in distinct(rows, POLICY)
    ]
    return Panel(title=title, lines=[line for line in lines if line.points])


def _points(rows: Sequence[Row], measure: Measure, x: str) -> list[tuple[float, Spread]]:
    return [
        (float(row.labels[x]), Spread(*(value * measure.scale for value in spread)))
        for row in rows
        if (spread := row.metrics.get(measure.metric)) is not None
    ]


def draw(chart: Chart, path: Path) -> None:
    """Write the chart as PNG."""
    from matplotlib.figure import Figure

    num_rows, num_columns = len(chart.panels), max(len(row) for row in chart.panels)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * num_columns, height * num_rows + 0.6), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    looks = _looks(chart)
    for row, (y_title, panels) in enumerate(zip(chart.y_titles, chart.panels, strict=True)):
        axes[row][0].set_ylabel(y_title, fontsize=8)
        for column, one in enumerate(panels):
            _draw_panel(axes[row][column], one, looks)
            axes[row][column].set_xlabel(chart.x_title if row == num_rows - 1 else "", fontsize=8)
    handles, columns = _handles(axes.flat), max(2, num_columns)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=7)
    _save(figure, path)


def _save(figure: "Figure", path: Path) -> None:
    """Save as a PNG of few colours, which is a fourth of the size."""
    from PIL import Image

    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    with Image.open(buffer) as picture:
        few = picture.convert("RGB").quantize(COLOURS_PER_FILE, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def _draw_panel(axes: "Axes", panel: Panel, looks: Mapping[str, dict[str, Any]]) -> None:
    for line in panel.lines:
        xs = [x for x, _ in line.points]
        medians, lows, highs = zip(*(spread for _, spread in line.points), strict=True)
        axes.plot(xs, medians, marker=".", label=line.name, **looks[line.name])
        axes.vlines(xs, lows, highs, color=looks[line.name]["color"], linewidth=0.8)
    all_xs = [x for line in panel.lines for x, _ in line.points]
    if all_xs and max(all_xs) > WIDE * min(all_xs):
        axes.set_xscale("log")
    axes.set_title(panel.title, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)


def _looks(chart: Chart) -> dict[str, dict[str, Any]]:
    """The same for the same name in every panel; LeMix stands out and lies on top."""
    names = dict.fromkeys(line.name for row in chart.panels for panel in row for line in panel.lines)
    return {
        name: {
            "color": f"C{number % 10}",
            "linestyle": "-" if number < 10 else "--",
            "linewidth": 2.2 if name == LEMIX else 1.0,
            "zorder": 3 if name == LEMIX else 2,
        }
        for number, name in enumerate(names)
    }


def _handles(axes: Iterable["Axes"]) -> dict[str, "Artist"]:
    """One for each name in the legend, from the first panel that has it."""
    found: dict[str, Artist] = {}
    for one in axes:
        for handle, name in zip(*one.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    return found
