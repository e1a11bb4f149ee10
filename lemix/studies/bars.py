"""Bars by group, one a policy: for numbers that do not lie on an axis."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lemix.studies.looks import looks_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INCHES_WIDE = 8.0
INCHES_PER_BAR = 0.2
INCHES_AROUND = 1.3
THICKNESS = 0.8
"""Share of its room that a group fills."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """Horizontal bars."""

    title: str
    x_title: str
    groups: Sequence[str]
    values: dict[str, Sequence[float | None]]
    """By policy, one a group; None: no answer."""
    most: float
    """Where there is no answer, the bar ends beyond this."""


def figure_of_bars(bars: Bars) -> "Figure":
    """One group below the other, the first at the top."""
    from matplotlib.figure import Figure

    num_bars, looks = len(bars.groups) * len(bars.values), looks_of(bars.values)
    figure = Figure(figsize=(INCHES_WIDE, INCHES_PER_BAR * num_bars + INCHES_AROUND), layout="constrained")
    axes = figure.add_subplot()
    thick = THICKNESS / max(1, len(bars.values))
    for place, (name, values) in enumerate(bars.values.items()):
        at = [group - THICKNESS / 2 + (place + 0.5) * thick for group in range(len(bars.groups))]
        lengths = [bars.most + 1 if value is None else value for value in values]
        drawn = axes.barh(at, lengths, height=0.9 * thick, color=looks[name].colour, label=name)
        words = [f"over {bars.most:g}" if value is None else f"{value:g}" for value in values]
        axes.bar_label(drawn, labels=words, fontsize=7, padding=2)
    axes.set_yticks(range(len(bars.groups)), bars.groups, fontsize=8)
    axes.invert_yaxis()
    axes.set_title(bars.title, fontsize=9)
    axes.set_xlabel(bars.x_title, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.locator_params(axis="x", integer=True)
    axes.margins(x=0.1)
    figure.legend(loc="outside lower center", ncols=len(bars.values), fontsize=8)
    return figure
