"""A picture of what each stage did when: the pipelines as the paper draws them, one row a stage."""

from collections import defaultdict
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lemix.simulation.record import RunRecord
from shared.messages.events import OpKind

COLOURS: dict[OpKind, str] = {
    "iteration": "tab:blue",
    "forward": "tab:green",
    "backward": "tab:orange",
    "step": "tab:red",
}
MAX_NODES = 8
"""More rows could not be told apart."""
ROW_INCHES = 0.35
BAR_HEIGHT = 0.8

Bars = list[tuple[float, float]]
"""Start and length of each."""


def draw_timeline(record: RunRecord, path: Path, *, window: tuple[float, float] | None = None) -> None:
    """Write a picture (PNG, SVG or PDF by the name) of the first nodes, in `window` (seconds; None: all)."""
    begin_s, end_s = window or (0.0, record.ended_s)
    num_nodes = min(record.num_nodes, MAX_NODES)
    num_rows = num_nodes * record.num_stages
    figure = Figure(figsize=(16, 1.2 + ROW_INCHES * num_rows), layout="constrained")
    axes = figure.add_subplot()
    for (node, stage, kind), bars in _bars(record, num_nodes, begin_s, end_s).items():
        row = node * record.num_stages + stage
        axes.broken_barh(bars, (row - BAR_HEIGHT / 2, BAR_HEIGHT), facecolors=COLOURS[kind])
    _label(axes, record, num_rows)
    axes.set_xlim(begin_s, end_s)
    figure.savefig(path, dpi=120)


def _bars(
    record: RunRecord, num_nodes: int, begin_s: float, end_s: float
) -> dict[tuple[int, int, OpKind], Bars]:
    """By node, stage and kind."""
    bars: defaultdict[tuple[int, int, OpKind], Bars] = defaultdict(list)
    for op in record.ops:
        if op.node < num_nodes and op.end_s > begin_s and op.start_s < end_s:
            bars[op.node, op.stage, op.kind].append((op.start_s, op.end_s - op.start_s))
    return bars


def _label(axes: Axes, record: RunRecord, num_rows: int) -> None:
    axes.set_yticks(
        range(num_rows),
        [f"node {row // record.num_stages} stage {row % record.num_stages}" for row in range(num_rows)],
    )
    axes.set_ylim(num_rows - 0.5, -0.5)
    for row in range(record.num_stages, num_rows, record.num_stages):
        axes.axhline(row - 0.5, color="black", linewidth=0.5)
    axes.set_xlabel("seconds")
    axes.legend(
        handles=[Patch(color=colour, label=kind) for kind, colour in COLOURS.items()],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(COLOURS),
    )
