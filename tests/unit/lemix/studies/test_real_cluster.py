"""Runs on a real cluster: how it is configured, and what is said of a run that is not over in time."""

from lemix.simulation.cluster import SimulationOptions
from lemix.simulation.record import BatchRecord, RequestRecord, RunRecord
from lemix.studies.real_cluster import REQUEST_TIMEOUT_S, cluster_options, what_is_missing
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


def request(took_s: float, error: str = "") -> RequestRecord:
    return RequestRecord(
        arrived_s=1.5, lengths=(9,), ended_s=1.5 + took_s, nodes=(0,), token_times_s=((),), error=error
    )


def batch(applied_s: float | None) -> BatchRecord:
    return BatchRecord(published_s=0.25, num_tokens=9, applied_s=applied_s, node=None)


def run(requests: tuple[RequestRecord, ...], batches: tuple[BatchRecord, ...]) -> RunRecord:
    return RunRecord(num_nodes=2, num_stages=2, ended_s=9.0, requests=requests, batches=batches)


def test_a_run_in_which_all_was_served_and_trained_misses_nothing() -> None:
    refused = request(0.1, "no memory")
    assert what_is_missing(run((request(0.1), refused), (batch(0.5),)), 1) == ""


def test_what_a_run_has_waited_for_in_vain_is_named() -> None:
    record = run((request(0.1), request(REQUEST_TIMEOUT_S, "not finished")), (batch(0.5), batch(None)))
    assert what_is_missing(record, 5) == (
        "missing: request 1 (sent at 1.50 s to (0,)), batch 1 (sent at 0.25 s),"
        " 3 batches that were never sent"
    )
