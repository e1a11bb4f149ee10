"""The learning study without its runs: which texts go where, what the losses of a run come to, the report."""

from random import Random

import pytest

from lemix.simulation.record import RequestRecord
from lemix.simulation.workload import PlannedBatch, PlannedRequest, Workload
from lemix.studies import paper
from lemix.studies.learning import learning, merge_every
from lemix.studies.learning_metrics import BATCHES_SERVED, LOSS, loss_metrics, part_metric
from lemix.studies.learning_report import (
    best_ratio,
    by_part,
    by_training_rate,
    over_separate,
    over_time,
    paper_rows,
    report,
)
from lemix.studies.learning_texts import bulletins, with_texts
from lemix.studies.rows import Row, Spread, points
from shared.errors import ConfigurationError

SEPARATE = "separate:split=training_rate"
WORKLOAD = Workload(
    requests=(PlannedRequest(0.5, (7,), 1), PlannedRequest(1.0, (9, 4), 1)),
    batches=(PlannedBatch((5, 6)), PlannedBatch((8,), at_s=2.0)),
    release="closed",
)
TEXTS = tuple((number,) * (number + 2) for number in range(6))


def request(loss: float | None, version: int | None) -> RequestRecord:
    return RequestRecord(
        arrived_s=0.0,
        lengths=(4,),
        ended_s=1.0,
        nodes=(0,),
        token_times_s=((1.0,),),
        versions=(version,),
        losses=(loss,),
    )


def row(policy: str, training_rate: float, loss: float, parallelism: str = "S-PP") -> Row:
    labels = {"parallelism": parallelism, "training_rate": training_rate, "policy": policy}
    spread = Spread(loss, loss - 0.5, loss + 0.5)
    return Row(labels, {LOSS: spread, part_metric(0): spread, part_metric(9): spread}, 3)


def test_every_sequence_gets_a_text_of_its_own_and_nothing_else_changes() -> None:
    dealt = with_texts(WORKLOAD, TEXTS, Random(1))
    of_requests = [text for each in dealt.requests for text in each.prompts]
    of_batches = [text for each in dealt.batches for text in each.examples]
    assert sorted([*of_requests, *of_batches]) == sorted(TEXTS)
    assert [each.at_s for each in dealt.requests] == [0.5, 1.0]
    assert [each.at_s for each in dealt.batches] == [0.0, 2.0]
    for lengths, texts in [
        *((each.lengths, each.prompts) for each in dealt.requests),
        *((each.lengths, each.examples) for each in dealt.batches),
    ]:
        assert lengths == tuple(map(len, texts))
    assert with_texts(WORKLOAD, TEXTS, Random(1)) == dealt != with_texts(WORKLOAD, TEXTS, Random(2))


def test_too_few_texts_are_an_error_before_anything_runs() -> None:
    with pytest.raises(ConfigurationError, match="6 texts are wanted, there are 5"):
        with_texts(WORKLOAD, TEXTS[:5], Random(1))


def test_bulletins_are_whole_texts_of_the_embedded_model() -> None:
    texts = bulletins()
    assert len(texts) == 1600
    assert min(map(len, texts)) >= 80
    assert max(map(len, texts)) <= 107


def test_losses_are_means_over_requests_and_over_each_tenth_of_them() -> None:
    requests = [request(float(number), number // 4) for number in range(20)]
    metrics = loss_metrics(requests)
    assert metrics[LOSS] == pytest.approx(9.5)
    assert metrics[BATCHES_SERVED] == pytest.approx(2.0)
    assert [metrics[part_metric(number)] for number in range(10)] == [2 * n + 0.5 for n in range(10)]


def test_what_has_no_answer_has_no_loss() -> None:
    metrics = loss_metrics([request(3.0, 2), request(None, None)])
    assert (metrics[LOSS], metrics[BATCHES_SERVED]) == (3.0, 2.0)
    assert metrics[part_metric(0)] is None  # less than a request in a part
    assert loss_metrics([])[LOSS] is None


@pytest.mark.parametrize(
    ("training_rate", "num_nodes", "every"), [(0.1, 4, 2), (0.5, 4, 8), (0.5, 8, 4), (0.9, 4, 14)]
)
def test_separate_shares_after_half_of_its_batches(training_rate: float, num_nodes: int, every: int) -> None:
    assert merge_every(training_rate, 120, num_nodes) == every


def test_separate_shares_after_at_most_100_batches_as_in_the_paper() -> None:
    assert merge_every(0.9, 334, 4) == 25


def test_only_separate_shares_its_weights() -> None:
    cells = learning(quick=False).cells
    sharing = {cell.policy for cell in cells if "merge" in cell.cluster.trainer_settings}
    assert sharing == {SEPARATE}
    assert {cell.policy for cell in cells} == {"lemix", "round_robin", "least_loaded", SEPARATE}


def test_the_papers_losses_stand_beside_ours_at_our_training_rates() -> None:
    rows = paper_rows("DP", [row("lemix", 0.9, 2.0)])
    found = {entry.labels["policy"]: entry.median(LOSS) for entry in rows}
    assert found["paper: lemix (gpt2-large)"] == 2.86
    assert found["paper: separate (gpt2-small)"] == 3.38
    assert len(found) == 12
    assert {entry.labels["training_rate"] for entry in rows} == {0.9}
    assert paper_rows("A-PP", [row("lemix", 0.9, 2.0)]) == []


def test_ratios_are_to_separate_of_the_same_source() -> None:
    ours = [row("lemix", 0.5, 2.0), row(SEPARATE, 0.5, 4.0), row("lemix", 0.9, 1.0)]
    ratios = {
        (entry.labels["policy"], entry.labels["training_rate"]): entry.median(LOSS)
        for entry in over_separate([*ours, *paper_rows("S-PP", ours)])
    }
    assert ratios["lemix", 0.5] == 0.5
    assert ("lemix", 0.9) not in ratios  # nothing to compare it with
    assert ratios["paper: lemix (gpt2-medium)", 0.5] == pytest.approx(3.06 / 4.21)
    assert not any("separate" in str(policy) for policy, _ in ratios)


def test_the_papers_headline_is_in_its_own_numbers() -> None:
    lemix, separate = (
        paper.LOSS_BY_TRAINING_RATE["S-PP", policy, "gpt2-large"][0] for policy in ("lemix", "separate")
    )
    assert lemix / separate == pytest.approx(paper.HEADLINE_LOSS, abs=0.005)


def test_the_best_ratio_decides_the_headline() -> None:
    met = best_ratio(points([row("lemix", 0.5, 2.0), row(SEPARATE, 0.5, 4.0), row("lemix", 0.9, 1.0)]))
    (finding,) = met.findings
    assert (met.met, finding.reached, finding.labels["training_rate"]) == (True, 0.5, 0.5)
    missed = best_ratio(points([row("lemix", 0.5, 3.0), row(SEPARATE, 0.5, 4.0)]))
    assert not missed.met
    assert best_ratio(points([row("lemix", 0.5, 3.0)])).findings == ()


def test_the_curve_over_time_is_of_the_middle_training_rate() -> None:
    parts = by_part([row("lemix", 0.5, 2.0), row("lemix", 0.9, 1.0)])
    assert [(part.labels["answered (%)"], part.median(LOSS)) for part in parts] == [(10, 2.0), (100, 2.0)]


def test_charts_have_the_papers_panels_beside_ours_and_policies_look_alike() -> None:
    rows = [row(policy, 0.5, 2.0, name) for name in ("S-PP", "A-PP") for policy in ("lemix", SEPARATE)]
    by_rate, over = by_training_rate(rows), over_time(rows)
    assert [[panel.title for panel in line] for line in by_rate.panels] == [
        ["S-PP", *(f"paper: S-PP, {model}" for model in paper.MODELS)]
    ]
    ours, papers, *_ = by_rate.panels[0]
    assert {line.name for line in ours.lines} <= {line.name for line in papers.lines}
    assert [panel.title for panel in over.panels[0]] == ["S-PP", "A-PP", "paper: Llama2-7B (% of the run)"]
    assert {line.name for line in over.panels[0][-1].lines} == {"round_robin", SEPARATE}


def test_the_report_judges_lemix_against_each_baseline() -> None:
    rows = [row("lemix", 0.5, 2.0), row("round_robin", 0.5, 1.5), row(SEPARATE, 0.5, 4.0)]
    verdicts = {verdict.criterion: verdict for verdict in report(rows).verdicts}
    assert verdicts["inference_loss at most 1 of separate's at parallelism S-PP"].met
    assert not verdicts["inference_loss at most 1 of round_robin's at parallelism S-PP"].met
    assert not verdicts["inference_loss at most 1 of least_loaded's at parallelism S-PP"].findings
