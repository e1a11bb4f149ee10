import pytest

from lemix.studies.live import FIXED, SIMULATED, difference, report, side_by_side, within
from lemix.studies.measures import RESPONSE, SLO_ATTAINMENT
from lemix.studies.rows import Row, Spread


def row(**medians: float) -> Row:
    """The lowest and the highest are far away: medians are compared."""
    return Row({"rate": 4, "policy": "lemix"}, {name: Spread(m, 0.0, 9.0) for name, m in medians.items()}, 5)


def test_the_difference_is_that_of_the_medians_as_a_share_of_the_clusters() -> None:
    one = row(response_mean_s=0.2, simulated_response_mean_s=0.15, fixed_hop_response_mean_s=0.1)
    assert difference(one, RESPONSE, SIMULATED) == pytest.approx(-0.25)
    assert difference(one, RESPONSE, FIXED) == pytest.approx(-0.5)
    assert difference(one, SLO_ATTAINMENT, SIMULATED) is None
    nothing_in_time = row(slo_attainment=0.0, simulated_slo_attainment=0.1)
    assert difference(nothing_in_time, SLO_ATTAINMENT, SIMULATED) is None


@pytest.mark.parametrize(
    ("simulated_s", "is_met"), [(0.2199, True), (0.1801, True), (0.221, False), (0.179, False)]
)
def test_ten_percent_either_way_is_allowed(simulated_s: float, is_met: bool) -> None:
    one = row(response_mean_s=0.2, simulated_response_mean_s=simulated_s)
    assert within([one], RESPONSE, SIMULATED).met is is_met


def test_the_worlds_stand_side_by_side() -> None:
    one = row(
        response_mean_s=0.2,
        simulated_response_mean_s=0.15,
        fixed_hop_response_mean_s=0.1,
        hop_s=0.00125,
        handover_s=0.0004,
    )
    real, simulated, fixed = side_by_side([one], [SIMULATED, FIXED])
    policies = [each.labels["policy"] for each in (real, simulated, fixed)]
    assert policies == ["lemix", "lemix (simulated)", "lemix (fixed hop)"]
    assert (simulated.median("response_mean_s"), fixed.median("response_mean_s")) == (0.15, 0.1)
    found = report([one])
    bodies = {section.title: section.body for section in found.sections}
    assert "| lemix (simulated) | 0.150 (0.00 to 9.00) |" in bodies["mean response (s) by rate"]
    assert "| **lemix** | -25.0 |" in bodies["Difference, simulated: mean response (%)"]
    assert "| **lemix** | -50.0 |" in bodies["Difference, fixed hop: mean response (%)"]
    assert "| **lemix** | 1.25 (" in bodies["hop (ms) by rate"]
    assert [verdict.met for verdict in found.verdicts if verdict.findings] == [False, False]
