from pathlib import Path

import pytest
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from lemix.simulation.record import Op, OpLog, RunRecord
from lemix.simulation.timeline_figure import MAX_NODES, draw_timeline
from shared.messages.events import OpKind


def record(*ops: tuple[int, int, OpKind, float, float], num_nodes: int = 2) -> RunRecord:
    log = OpLog()
    for node, stage, kind, start_s, end_s in ops:
        log.append(Op(node, stage, kind, start_s, end_s, 1))
    return RunRecord(num_nodes=num_nodes, num_stages=2, ended_s=10.0, requests=(), batches=(), ops=log)


RUN = record((0, 0, "iteration", 1.0, 2.0), (1, 1, "backward", 4.0, 8.0), (1, 1, "backward", 9.0, 9.5))


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Each figure that is written."""
    written: list[Figure] = []
    savefig = Figure.savefig

    def keep(figure: Figure, *args: object, **options: object) -> None:
        written.append(figure)
        savefig(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return written


def boxes(figure: Figure) -> list[tuple[float, float, float]]:
    """Start, end and row of every bar, without what floats add."""
    (axes,) = figure.axes
    corners = [
        path.get_extents()
        for bars in axes.collections
        if isinstance(bars, PolyCollection)
        for path in bars.get_paths()
    ]
    return sorted((round(box.x0, 9), round(box.x1, 9), round((box.y0 + box.y1) / 2, 9)) for box in corners)


def test_every_op_is_a_bar_in_the_row_of_its_stage(tmp_path: Path, figures: list[Figure]) -> None:
    draw_timeline(RUN, tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    assert boxes(figures[0]) == [(1.0, 2.0, 0.0), (4.0, 8.0, 3.0), (9.0, 9.5, 3.0)]
    (axes,) = figures[0].axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["node 0 stage 0", "node 0 stage 1", "node 1 stage 0", "node 1 stage 1"]
    assert axes.get_xlim() == (0.0, 10.0)


def test_a_window_shows_what_touches_it(tmp_path: Path, figures: list[Figure]) -> None:
    draw_timeline(RUN, tmp_path / "timeline.svg", window=(1.5, 5.0))
    assert "<svg" in (tmp_path / "timeline.svg").read_text()
    assert boxes(figures[0]) == [(1.0, 2.0, 0.0), (4.0, 8.0, 3.0)]
    assert figures[0].axes[0].get_xlim() == (1.5, 5.0)


def test_a_large_cluster_is_drawn_in_part(tmp_path: Path, figures: list[Figure]) -> None:
    ops = [(node, 0, "iteration", 1.0, 2.0) for node in range(1_000)]
    draw_timeline(record(*ops, num_nodes=1_000), tmp_path / "timeline.png")
    assert len(boxes(figures[0])) == MAX_NODES
