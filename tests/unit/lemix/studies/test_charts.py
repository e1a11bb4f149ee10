from pathlib import Path

from lemix.studies.charts import chart_by, draw
from lemix.studies.measures import IDLE_SHARE, SLO_ATTAINMENT, TASKS_PER_NODE_S, TRAINING_TOKENS
from lemix.studies.rows import Row, Spread

MEASURES = (SLO_ATTAINMENT, TASKS_PER_NODE_S, TRAINING_TOKENS, IDLE_SHARE)
SMALL_BYTES = 150_000
"""For four rows of panels."""


def row(kind: str, rate: int, policy: str, value: float) -> Row:
    spread = Spread(value, value / 2, value * 1.5)
    return Row({"class": kind, "rate": rate, "policy": policy}, {each.metric: spread for each in MEASURES}, 5)


def test_a_chart_has_a_row_a_measure_and_a_column_a_class() -> None:
    rows = [row("a", 4, "lemix", 0.5), row("b", 4, "lemix", 0.7), row("b", 8, "random", 0.5)]
    chart = chart_by(rows, "rate", MEASURES[:2], "class")
    assert [[panel.title for panel in line] for line in chart.panels] == [["a", "b"], ["a", "b"]]
    of_b = chart.panels[0][1]
    assert [line.name for line in of_b.lines] == ["lemix", "random"]
    assert of_b.lines[1].points == [(8.0, Spread(50.0, 25.0, 75.0))]


def test_what_was_not_measured_is_no_line() -> None:
    rows = [Row({"rate": 4, "policy": "lemix"}, {}, 1)]
    chart = chart_by(rows, "rate", MEASURES[:1])
    assert chart.panels[0][0].lines == []


def test_a_row_of_the_largest_figure_takes_its_share_of_a_small_file(tmp_path: Path) -> None:
    rows = [
        row(kind, rate, f"policy {number}", 1 + number * rate / (40 + rate))
        for kind in ("gpt2-small", "gpt2-medium", "gpt2-large")
        for rate in (4, 8, 16, 24, 32, 64, 128)
        for number in range(11)
    ]
    path = tmp_path / "chart.png"
    draw(chart_by(rows, "rate", MEASURES[:1], "class"), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < SMALL_BYTES / 4
