"""Each criterion on grid points drawn by hand."""

from collections.abc import Mapping

from lemix.studies import verdicts
from lemix.studies.rows import Point, Row, Spread
from lemix.studies.verdicts import APPLIED, GOODPUT, SLO, THROUGHPUT, TRAINING


def row(policy: str, **metrics: float) -> Row:
    return Row({"policy": policy}, {name: Spread(value, value, value) for name, value in metrics.items()}, 1)


def point(
    by_policy: Mapping[str, Mapping[str, float]], *, rate: int = 4, training_rate: float = 0.9
) -> Point:
    labels = {"class": "gpt2-small", "rate": rate, "training_rate": training_rate}
    return Point(labels, {policy: row(policy, **metrics) for policy, metrics in by_policy.items()})


def slo_point(ours: float, **others: float) -> Point:
    return point({"lemix": {SLO: ours}, **{name: {SLO: value} for name, value in others.items()}})


def test_one_percentage_point_below_the_best_baseline_is_allowed_and_not_more() -> None:
    near = verdicts.slo_near_best([slo_point(0.90, random=0.70, round_robin=0.91)])
    assert near.met
    far = verdicts.slo_near_best([slo_point(0.95, random=0.70), slo_point(0.89, random=0.91)])
    assert not far.met
    (missed,) = far.missed
    assert (missed.reached, missed.needed, missed.against) == (0.89, 0.90, "random")


def test_of_several_configurations_of_separate_the_best_counts() -> None:
    by_policy = {
        "lemix": {THROUGHPUT: 2.0},
        "separate:split=0.5": {THROUGHPUT: 1.0},
        "separate:split=dynamic": {THROUGHPUT: 2.5},
        "round_robin": {THROUGHPUT: 9.0},
    }
    (missed,) = verdicts.throughput_over_separate([point(by_policy)]).missed
    assert (missed.needed, missed.against) == (2.5, "separate:split=dynamic")


def test_only_a_weak_separate_at_the_highest_training_rate_must_be_doubled() -> None:
    weak = {"lemix": {SLO: 0.84}, "separate": {SLO: 0.40}}
    strong = {"lemix": {SLO: 0.50}, "separate": {SLO: 0.45}}
    grid = [point(weak), point(strong, rate=8), point(weak, rate=16, training_rate=0.5)]
    (finding,) = verdicts.slo_over_weak_separate(grid).findings
    assert finding.labels["rate"] == 4
    assert not finding.met
    assert finding.needed == 2.12 * 0.40


def test_the_best_throughput_ratio_is_one_finding_over_the_grid() -> None:
    grid = [
        point({"lemix": {THROUGHPUT: 3.0}, "separate": {THROUGHPUT: 1.0}}, rate=4),
        point({"lemix": {THROUGHPUT: 8.0}, "separate": {THROUGHPUT: 2.0}}, rate=8),
    ]
    (finding,) = verdicts.best_throughput_ratio(grid).findings
    assert (finding.reached, finding.labels["rate"], finding.met) == (4.0, 8, True)
    assert not verdicts.best_throughput_ratio(grid[:1]).met


def test_what_is_possible_is_the_best_bound_over_separates_best() -> None:
    first = {"bound": {"most": 6.0}, "separate": {THROUGHPUT: 1.0}, "separate:split=0.5": {THROUGHPUT: 2.0}}
    second = {"bound": {"most": 8.0}, "separate": {THROUGHPUT: 4.0}}
    assert verdicts.possible_throughput_ratio([point(first), point(second)], "most") == 3.0
    assert verdicts.possible_throughput_ratio([point({"separate": {THROUGHPUT: 1.0}})], "most") is None


def test_goodput_may_be_two_percent_below_round_robin() -> None:
    def met(ours: float) -> bool:
        return verdicts.goodput_near_round_robin(
            [point({"lemix": {GOODPUT: ours}, "round_robin": {GOODPUT: 10.0}, "random": {GOODPUT: 99.0}})]
        ).met

    assert met(9.8)
    assert not met(9.79)


def test_training_is_held_against_round_robin_only_where_that_meets_its_objective() -> None:
    starved = {"lemix": {TRAINING: 80.0}, "round_robin": {TRAINING: 100.0, SLO: 0.95}}
    excused = {"lemix": {TRAINING: 80.0}, "round_robin": {TRAINING: 100.0, SLO: 0.89}}
    assert not verdicts.training_near_round_robin([point(starved)]).met
    assert verdicts.training_near_round_robin([point(excused)]).findings == ()


def test_a_baseline_dominates_only_when_it_is_higher_in_both() -> None:
    def dominated(ours: tuple[float, float], theirs: tuple[float, float], **margins: float) -> bool:
        pairs = {"lemix": ours, "random": theirs}
        by_policy = {name: {SLO: slo, TRAINING: training} for name, (slo, training) in pairs.items()}
        return not verdicts.undominated([point(by_policy)], **margins).met

    assert dominated((0.90, 100.0), (0.91, 101.0))
    assert not dominated((0.90, 100.0), (0.91, 100.0))
    assert not dominated((0.90, 100.0), (0.90, 200.0))
    assert not dominated((0.900, 100.0), (0.9009, 200.0), slo_margin=0.001, training_margin=0.005)
    assert not dominated((0.90, 100.0), (0.95, 100.4), slo_margin=0.001, training_margin=0.005)
    assert dominated((0.90, 100.0), (0.95, 100.6), slo_margin=0.001, training_margin=0.005)


def test_one_batch_left_in_one_run_of_any_policy_is_a_miss() -> None:
    rows = {
        "lemix": Row({"policy": "lemix"}, {APPLIED: Spread(1.0, 1.0, 1.0)}, 5),
        "random": Row({"policy": "random"}, {APPLIED: Spread(1.0, 0.98, 1.0)}, 5),
    }
    (missed,) = verdicts.all_applied([Point({"rate": 4}, rows)]).missed
    assert (missed.against, missed.reached) == ("random", 0.98)


def test_a_ratio_to_separate_is_judged_only_where_it_is_asked_for() -> None:
    values = {"lemix": {"ttft": 0.04}, "separate": {"ttft": 0.1}, "separate:split=0.5": {"ttft": 0.09}}
    grid = [point(values, rate=8), point(values, rate=12)]
    (finding,) = verdicts.ratio_verdict(grid, "ttft", 0.43, {"rate": 8}).findings
    assert finding.needed == 0.43 * 0.09
    assert not finding.met


def test_a_criterion_without_any_point_is_met_and_says_so_by_having_none() -> None:
    assert all(verdict.findings == () and verdict.met for verdict in verdicts.main_verdicts([]))
