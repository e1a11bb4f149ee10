from lemix.studies.rows import Spread, aggregate, distinct, points, select

RUNS = [
    ({"rate": 4, "policy": "lemix"}, {"slo": 0.9, "tbt": None}),
    ({"rate": 4, "policy": "random"}, {"slo": 0.5, "tbt": 0.1}),
    ({"rate": 4, "policy": "lemix"}, {"slo": 0.7, "tbt": None}),
    ({"rate": 8, "policy": "lemix"}, {"slo": 0.6, "tbt": 0.3}),
    ({"rate": 4, "policy": "lemix"}, {"slo": 1.0, "tbt": 0.2}),
]


def test_runs_with_equal_labels_are_one_row_of_medians_with_ranges() -> None:
    first, second, third = aggregate(RUNS)
    assert first.labels == {"rate": 4, "policy": "lemix"}
    assert (first.num_runs, second.num_runs, third.num_runs) == (3, 1, 1)
    assert first.metrics["slo"] == Spread(0.9, 0.7, 1.0)


def test_what_no_run_measured_is_left_out_and_what_some_measured_is_theirs() -> None:
    first, _, _ = aggregate(RUNS)
    assert first.metrics["tbt"] == Spread(0.2, 0.2, 0.2)
    (alone,) = aggregate([({"policy": "lemix"}, {"tbt": None})])
    assert alone.metrics == {}
    assert alone.median("tbt") is None


def test_a_point_holds_all_policies_of_a_setting() -> None:
    rows = aggregate(RUNS)
    first, second = points(rows)
    assert (first.labels, list(first.by_policy)) == ({"rate": 4}, ["lemix", "random"])
    assert (second.labels, list(second.by_policy)) == ({"rate": 8}, ["lemix"])


def test_rows_are_selected_by_their_labels() -> None:
    rows = aggregate(RUNS)
    assert [row.labels["rate"] for row in select(rows, policy="lemix")] == [4, 8]
    assert distinct(rows, "policy") == ["lemix", "random"]
