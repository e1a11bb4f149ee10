import pytest

from lemix.simulation.cluster import SimulationOptions
from lemix.studies.live import cluster_options, difference, report, side_by_side, within
from lemix.studies.measures import RESPONSE, SLO_ATTAINMENT
from lemix.studies.rows import Row, Spread
from services.gateway.settings import GatewaySettings
from services.scheduler.settings import SchedulerSettings
from services.stage_worker.settings import StageWorkerSettings
from services.trainer.settings import TrainerSettings

OPTIONS = SimulationOptions(
    nodes=2,
    profile="llama2-13b@a100",
    policy="lemix",
    stage_settings={"kv_tokens": 1_000},
    trainer_settings={"microbatches": 1},
)


def row(**metrics: float) -> Row:
    spreads = {name: Spread(value, value, value) for name, value in metrics.items()}
    return Row({"rate": 4, "policy": "lemix"}, spreads, 1)


def test_the_real_cluster_is_configured_as_the_simulated_one(tmp_path) -> None:
    chosen = cluster_options(OPTIONS, tmp_path)
    chosen.validate()
    assert (chosen.nodes, chosen.stages, chosen.emulate) == (2, 2, "llama2-13b@a100")
    assert (chosen.extra_env["LEMIX_KV_TOKENS"], chosen.extra_env["LEMIX_MICROBATCHES"]) == ("1000", "1")


def test_every_setting_for_it_is_one_of_a_service_and_has_a_value_it_takes(tmp_path, monkeypatch) -> None:
    chosen = cluster_options(OPTIONS, tmp_path)
    kinds = (GatewaySettings, SchedulerSettings, StageWorkerSettings, TrainerSettings)
    known = {f"LEMIX_{name.upper()}" for kind in kinds for name in kind.model_fields}
    assert chosen.extra_env.keys() - known == set()
    for name, value in {**chosen.extra_env, "LEMIX_NUM_STAGES": "2"}.items():
        monkeypatch.setenv(name, value)
    SchedulerSettings()
    TrainerSettings()
    StageWorkerSettings(node=0, stage=0)


def test_the_difference_is_a_share_of_what_the_cluster_did() -> None:
    assert difference({"response_mean_s": 0.2}, {"response_mean_s": 0.15}, RESPONSE) == pytest.approx(-0.25)
    assert difference({"response_mean_s": None}, {"response_mean_s": 0.15}, RESPONSE) is None
    assert difference({"slo_attainment": 0.0}, {"slo_attainment": 0.1}, SLO_ATTAINMENT) is None


@pytest.mark.parametrize(("off_by", "is_met"), [(0.10, True), (-0.10, True), (0.11, False), (-0.11, False)])
def test_ten_percent_either_way_is_allowed(off_by: float, is_met: bool) -> None:
    assert within([row(difference_response_mean_s=off_by)], RESPONSE).met is is_met


def test_both_worlds_stand_side_by_side() -> None:
    one = row(response_mean_s=0.2, simulated_response_mean_s=0.15, difference_response_mean_s=-0.25)
    real, simulated = side_by_side([one])
    assert (real.labels["policy"], simulated.labels["policy"]) == ("lemix", "lemix (simulated)")
    assert simulated.median("response_mean_s") == 0.15
    text = "\n".join(section.body for section in report([one]).sections)
    assert "| lemix (simulated) | 0.150 |" in text
    assert "| **lemix** | -25.0 |" in text
