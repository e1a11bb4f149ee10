from pathlib import Path

import pytest

from lemix.studies.bars import Bars, figure_of_bars
from lemix.studies.catalogue import STUDIES, study_named
from lemix.studies.charts import Chart, Line, chart_by, draw, figure_of, is_logarithmic, stretching
from lemix.studies.looks import KNOWN, looks_of
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


def line(name: str, *medians: float) -> Line:
    return Line(name=name, points=[(x, Spread(y, y, y)) for x, y in enumerate(medians)])


def test_every_policy_of_every_study_has_a_look_of_its_own() -> None:
    run = {
        cell.policy
        for name in set(STUDIES) - {"ablation", "busy-parts", "sensitivity"}
        for cell in study_named(name, quick=False).cells
    }
    assert run - set(KNOWN) == set()
    looks = [KNOWN[policy] for policy in run]
    assert len({(look.colour, look.marker) for look in looks}) == len(looks)


def test_the_paper_has_the_colour_of_its_policy_and_dashes() -> None:
    looks = looks_of(["lemix", "paper: lemix", "no_deferral", "no_memory_check"])
    assert looks["paper: lemix"].colour == looks["lemix"].colour
    assert looks["paper: lemix"].dashes != looks["lemix"].dashes
    assert looks["no_deferral"] != looks["no_memory_check"]


def test_lines_go_from_left_to_right_whatever_the_order_of_the_rows() -> None:
    rows = [row("a", rate, "lemix", rate) for rate in (8, 1, 4, 2)]
    (drawn,) = chart_by(rows, "rate", MEASURES[1:2]).panels[0][0].lines
    assert [x for x, _ in drawn.points] == [1.0, 2.0, 4.0, 8.0]


def test_one_bad_policy_does_not_stretch_the_axis_but_lemix_is_always_shown() -> None:
    good = [line("lemix", 1, 2), line("round_robin", 1, 3), line("random", 2, 3)]
    assert stretching(good) is None
    assert stretching([*good, line("lemix_released", 5, 90)]) == "lemix_released"
    assert stretching([line("lemix", 1, 90), *good[1:]]) is None


def test_the_papers_numbers_of_another_size_stand_on_a_logarithmic_axis() -> None:
    ours = [line("lemix", 0.006, 0.007), line("random", 0.9, 0.9)]
    assert is_logarithmic([*ours, line("paper: lemix", 0.08, 0.1)])
    assert not is_logarithmic([*ours, line("paper: lemix", 0.008, 0.01)])
    assert not is_logarithmic(ours)


@pytest.mark.parametrize("columns", [1, 3])
def test_no_legend_is_cut(columns: int) -> None:
    rows = [
        row(str(column), rate, policy, rate)
        for column in range(columns)
        for rate in (4, 8)
        for policy in KNOWN
    ]
    check_that_all_is_inside(chart_by(rows, "rate", MEASURES[:1], "class"))


def check_that_all_is_inside(chart: Chart | Bars) -> None:
    figure = figure_of_bars(chart) if isinstance(chart, Bars) else figure_of(chart)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box, whole = legend.get_window_extent(), figure.bbox
    assert whole.x0 <= box.x0 and box.x1 <= whole.x1
    assert whole.y0 <= box.y0 and box.y1 <= whole.y1


def test_bars_say_their_numbers_and_where_there_is_none(tmp_path: Path) -> None:
    bars = Bars(
        title="t",
        x_title="nodes",
        groups=["a", "b"],
        values={"lemix": [3, 4], "least_loaded": [4, 4], "round_robin": [6, None], "separate": [5, 7]},
        most=12,
    )
    check_that_all_is_inside(bars)
    told = {text.get_text() for text in figure_of_bars(bars).axes[0].texts}
    assert told == {"3", "4", "5", "6", "7", "over 12"}
    draw(bars, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 1_000
