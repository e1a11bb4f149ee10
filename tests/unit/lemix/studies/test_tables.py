import pytest

from lemix.studies.measures import SLO_ATTAINMENT, TRAINING_TOKENS, number
from lemix.studies.rows import Row, Spread
from lemix.studies.tables import bound_of, missed_sections, pivot, verdict_table
from lemix.studies.verdicts import Finding, Verdict

ROWS = [
    Row({"rate": 4, "policy": "lemix"}, {"slo_attainment": Spread(0.987, 0.95, 1.0)}, 5),
    Row({"rate": 8, "policy": "lemix"}, {"slo_attainment": Spread(0.5, 0.5, 0.5)}, 5),
    Row({"rate": 8, "policy": "random"}, {"slo_attainment": Spread(0.25, 0.25, 0.25)}, 5),
]
MISS = Finding({"rate": 8}, 0.5, 0.6, False, "random", "tasks_per_node_s")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.00"), (0.1234, "0.123"), (12.34, "12.3"), (123.4, "123"), (76299.9, "76300"), (2e-7, "2.00e-07")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_a_pivot_has_a_line_a_policy_and_leaves_out_what_was_not_run() -> None:
    assert pivot(ROWS, SLO_ATTAINMENT, "rate").splitlines() == [
        "| policy | 4 | 8 |",
        "| --- | --- | --- |",
        "| **lemix** | 98.7 (95.0 to 100.0) | 50.0 |",
        "| random |  | 25.0 |",
    ]
    assert "|  |  |" in pivot(ROWS, TRAINING_TOKENS, "rate")


def test_verdicts_are_counted() -> None:
    good = Finding({"rate": 4}, 1.0, 0.6, True, "random", "slo_attainment")
    text = verdict_table([Verdict("half", (good, MISS)), Verdict("none", ()), Verdict("all", (good,))])
    assert text.splitlines()[2:] == [
        "| half | **missed** | 1 | 2 |",
        "| none | no such point | 0 | 0 |",
        "| all | met | 1 | 1 |",
    ]


def test_a_missed_point_stands_with_its_numbers_and_its_bounds() -> None:
    spreads = {"tasks_per_node_s": Spread(0.7, 0.7, 0.7), "tasks_per_node_s_in_time": Spread(0.55, 0.5, 0.6)}
    bounds = [Row({"rate": 8, "policy": "bound"}, spreads, 5), Row({"rate": 4, "policy": "bound"}, {}, 5)]
    (section,) = missed_sections([Verdict("much", (MISS,)), Verdict("met", ())], bounds)
    assert section.title == "Missed: much"
    assert "| 0.700, 0.550 in time: permitted if some are late |" in section.body.splitlines()[-1]


@pytest.mark.parametrize(
    ("reached", "needed", "bounds", "words"),
    [
        (0.5, 0.6, {"much": 0.7}, "0.700: permitted"),
        (0.5, 0.6, {"much": 0.55}, "0.550: forbidden"),
        (0.6, 0.5, {"much": 0.4}, "0.400: permitted"),  # the less the better
        (0.6, 0.5, {"much": 0.55}, "0.550: forbidden"),
        (0.5, 0.6, {"much": 0.9, "much_in_time": 0.7}, "0.900, 0.700 in time: permitted"),
        (0.5, 0.6, {"much": 0.9, "much_in_time": 0.55}, "0.900, 0.550 in time: permitted if some are late"),
        (0.5, 0.6, {"much": 0.59, "much_in_time": 0.55}, "0.590, 0.550 in time: forbidden"),
        (0.5, 0.6, {}, "none of a single point"),
    ],
)
def test_a_bound_permits_or_forbids_what_was_needed(
    reached: float, needed: float, bounds: dict[str, float], words: str
) -> None:
    row = Row(
        {"rate": 8, "policy": "bound"},
        {name: Spread(value, value, value) for name, value in bounds.items()},
        5,
    )
    assert bound_of(Finding({"rate": 8}, reached, needed, False, "random", "much"), [row]) == words


def test_a_missed_point_says_what_both_policies_paid() -> None:
    def row(policy: str, slo: float, training: float) -> Row:
        spreads = {
            "slo_attainment": Spread(slo, slo, slo),
            "training_tokens_per_s": Spread(training, training, training),
        }
        return Row({"rate": 8, "policy": policy}, spreads, 5)

    rows = [row("lemix", 0.998, 2000), row("random", 0.5, 3000), row("best", 0.0, 0)]
    (section,) = missed_sections([Verdict("much", (MISS,))], rows)
    assert section.body.splitlines()[-1].endswith(
        "| 99.8 % in time, 2000 training tokens/s | 50.0 % in time, 3000 training tokens/s |"
    )
