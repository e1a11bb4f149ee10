"""The figures of studies: lines with ranges, in panels."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lemix.studies.bars import Bars, figure_of_bars
from lemix.studies.looks import PAPER, Look, looks_of
from lemix.studies.measures import Measure
from lemix.studies.rows import POLICY, Row, Spread, distinct, select
from lemix.studies.verdicts import LEMIX

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_INCHES = (3.4, 2.5)
LEAST_INCHES = 6.4
"""Width of the narrowest figure."""
LEGEND_INCHES_PER_LETTER = 0.068
LEGEND_INCHES = 0.75
"""Line and gaps of each entry of a legend."""
STRETCHED = 3
"""One line that makes the axis so many times as long as the others need is let run off it."""
LOGARITHMIC = 10
"""Where the paper's numbers are so many times ours, or ours theirs, the axis is logarithmic."""
TICKS = 8
"""So few values of x are all written."""
DOTS_PER_INCH = 90
COLOURS_PER_FILE = 256
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
    """From left to right."""
    return sorted(
        (float(row.labels[x]), Spread(*(value * measure.scale for value in spread)))
        for row in rows
        if (spread := row.metrics.get(measure.metric)) is not None
    )


def draw(chart: Chart | Bars, path: Path) -> None:
    """Write the chart as PNG."""
    _save(figure_of_bars(chart) if isinstance(chart, Bars) else figure_of(chart), path)


def figure_of(chart: Chart) -> "Figure":
    """The panels, with one legend below them all that the figure has room for."""
    from matplotlib.figure import Figure

    num_rows, num_columns = len(chart.panels), max(len(row) for row in chart.panels)
    width, height = max(PANEL_INCHES[0] * num_columns, LEAST_INCHES), PANEL_INCHES[1] * num_rows
    names = [line.name for row in chart.panels for panel in row for line in panel.lines]
    longest = max(map(len, names), default=0)
    legend_columns = max(1, int(width / (LEGEND_INCHES + LEGEND_INCHES_PER_LETTER * longest)))
    legend_rows = -(-len(set(names)) // legend_columns)
    figure = Figure(figsize=(width, height + 0.2 * legend_rows + 0.2), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    looks = looks_of(names)
    for row, (y_title, panels) in enumerate(zip(chart.y_titles, chart.panels, strict=True)):
        axes[row][0].set_ylabel(y_title, fontsize=8)
        for column, one in enumerate(panels):
            _draw_panel(axes[row][column], one, looks)
            axes[row][column].set_xlabel(chart.x_title if row == num_rows - 1 else "", fontsize=8)
    handles = _handles(axes.flat)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=legend_columns, fontsize=8
    )
    return figure


def _save(figure: "Figure", path: Path) -> None:
    """Save as a PNG of few colours, which is a fourth of the size."""
    from PIL import Image

    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    with Image.open(buffer) as picture:
        few = picture.convert("RGB").quantize(COLOURS_PER_FILE, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def _draw_panel(axes: "Axes", panel: Panel, looks: Mapping[str, Look]) -> None:
    for line in panel.lines:
        xs = [x for x, _ in line.points]
        medians, lows, highs = zip(*(spread for _, spread in line.points), strict=True)
        axes.plot(xs, medians, label=line.name, **_style(line.name, looks[line.name]))
        axes.vlines(xs, lows, highs, color=looks[line.name].colour, linewidth=0.8)
    _set_scales(axes, panel)
    axes.set_title(panel.title, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


def _set_scales(axes: "Axes", panel: Panel) -> None:
    all_xs = [x for line in panel.lines for x, _ in line.points]
    if all_xs and max(all_xs) > WIDE * min(all_xs):
        axes.set_xscale("log")
    elif len(set(all_xs)) <= TICKS:
        axes.set_xticks(sorted(set(all_xs)))
    if is_logarithmic(panel.lines):
        axes.set_yscale("log")
    elif (name := stretching(panel.lines)) is not None:
        low, high = _range(line for line in panel.lines if line.name != name)
        margin = 0.1 * (high - low)
        axes.set_ylim(low - margin, high + margin)
        axes.text(0.03, 0.03, f"{name} runs off", transform=axes.transAxes, fontsize=7, color="#555555")


def is_logarithmic(lines: Sequence[Line]) -> bool:
    """Whether the paper's numbers and ours are of different size."""
    ours = [line for line in lines if line.name == LEMIX]
    papers = [line for line in lines if line.name.startswith(PAPER)]
    if not ours or not papers or _range(lines)[0] <= 0:
        return False
    (_, our_most), (_, their_most) = _range(ours), _range(papers)
    return max(our_most / their_most, their_most / our_most) > LOGARITHMIC


def stretching(lines: Sequence[Line]) -> str | None:
    """The one line that alone makes the axis much longer than the others need; None: there is none."""
    if len(lines) < 3:  # of two, each stretches the other's axis
        return None

    def without(name: str) -> float:
        low, high = _range(line for line in lines if line.name != name)
        return high - low

    low, high = _range(lines)
    worst = min((line.name for line in lines if line.name != LEMIX), key=without)
    is_bad = 0 < STRETCHED * without(worst) < high - low
    return worst if is_bad else None


def _range(lines: Iterable[Line]) -> tuple[float, float]:
    medians = [spread.median for line in lines for _, spread in line.points]
    return min(medians), max(medians)


def _style(name: str, look: Look) -> dict[str, Any]:
    """LeMix stands out and lies on top; the paper's marks are hollow."""
    return {
        "color": look.colour,
        "linestyle": look.dashes,
        "marker": look.marker,
        "markersize": 4,
        "markerfacecolor": "white" if name.startswith(PAPER) else look.colour,
        "linewidth": 2.2 if name == LEMIX else 1.1,
        "zorder": 3 if name == LEMIX else 2,
    }


def _handles(axes: Iterable["Axes"]) -> dict[str, "Artist"]:
    """One for each name in the legend, from the first panel that has it."""
    found: dict[str, Artist] = {}
    for one in axes:
        for handle, name in zip(*one.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    return found
