from dataclasses import replace
from pathlib import Path

import pytest

from lemix.topology import ClusterOptions, ServiceSpec, layout_of, module_command, service_specs
from shared.errors import ConfigurationError

INHERITED = {"PATH": "/bin", "LEMIX_LEARNING_RATE": "0.5", "LEMIX_RUN_DIR": "/elsewhere"}


def specs_of(
    options: ClusterOptions, inherited: dict[str, str] = INHERITED, *, num_cores: int = 2
) -> dict[str, ServiceSpec]:
    specs = service_specs(
        options,
        nats_url="nats://127.0.0.1:1",
        nats_users=None,
        port=8123,
        shm_dir=Path("/shm/x"),
        num_cores=num_cores,
        inherited=inherited,
    )
    return {spec.name: spec for spec in specs}


def settings_of(options: ClusterOptions, name: str, num_cores: int = 2) -> list[str | None]:
    """One setting of all stage workers."""
    specs = specs_of(options, num_cores=num_cores).items()
    return [spec.environment.get(name) for worker, spec in specs if worker.startswith("node")]


def test_every_service_and_every_stage_of_every_node_is_started() -> None:
    specs = specs_of(ClusterOptions(nodes=2, stages=3, stages_per_worker=1))
    stages = [f"node-{node}-stage-{stage}" for node in range(2) for stage in range(3)]
    assert list(specs) == ["scheduler", "gateway", "trainer", *stages]
    assert specs["gateway"].command == module_command("gateway")
    assert specs["node-1-stage-2"].command == module_command("stage_worker")


def test_each_stage_is_told_its_place() -> None:
    environment = specs_of(ClusterOptions(nodes=2, stages=2, stages_per_worker=1))[
        "node-1-stage-0"
    ].environment
    assert environment["LEMIX_NODE"] == "1"
    assert environment["LEMIX_STAGE"] == "0"
    assert environment["LEMIX_NUM_STAGES"] == "2"
    assert environment["LEMIX_SHM_DIR"] == "/shm/x"
    assert environment["LEMIX_DEVICE"] == "cpu"


def test_devices_are_dealt_out_in_order_and_again_when_short() -> None:
    options = ClusterOptions(nodes=2, stages=2, devices=("cuda:0", "cuda:1", "cuda:2"))
    assert settings_of(options, "LEMIX_DEVICE") == ["cuda:0,cuda:1", "cuda:2,cuda:0"]
    alone = replace(options, stages_per_worker=1)
    assert settings_of(alone, "LEMIX_DEVICE") == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    assert settings_of(replace(options, devices=("cuda:0",)), "LEMIX_DEVICE") == ["cuda:0", "cuda:0"]


def test_stage_workers_know_how_many_stages_share_their_devices() -> None:
    options = ClusterOptions(nodes=2, stages=2, devices=("cuda:0", "cuda:1", "cuda:2"))
    assert settings_of(options, "LEMIX_STAGES_ON_DEVICE") == ["2", "2"]
    alone = replace(options, stages_per_worker=1)
    assert settings_of(alone, "LEMIX_STAGES_ON_DEVICE") == ["2", None, None, "2"]
    assert settings_of(ClusterOptions(nodes=3), "LEMIX_STAGES_ON_DEVICE") == [None] * 3


def test_a_worker_holds_all_stages_of_a_node_where_cores_are_short_unless_told_otherwise() -> None:
    options = ClusterOptions(nodes=2, stages=3)
    assert list(specs_of(options))[3:] == ["node-0-stages-0-2", "node-1-stages-0-2"]
    assert settings_of(options, "LEMIX_STAGES_HELD") == ["3", "3"]
    by_two = replace(options, nodes=1, stages_per_worker=2)
    assert [name for name in specs_of(by_two) if name.startswith("node")] == [
        "node-0-stages-0-1",
        "node-0-stage-2",
    ]
    assert settings_of(by_two, "LEMIX_STAGES_HELD") == ["2", None]
    assert settings_of(replace(options, stages=1, stages_per_worker=4), "LEMIX_STAGES_HELD") == [None, None]


def test_emulated_stages_have_a_process_each_as_they_have_a_device_each() -> None:
    options = ClusterOptions(nodes=1, stages=4, emulate="llama2-7b@a100")
    assert settings_of(options, "LEMIX_STAGES_HELD") == [None] * 4


@pytest.mark.parametrize(
    ("options", "num_cores", "threads"),
    [
        (ClusterOptions(nodes=1, stages=2), 8, "4"),
        (ClusterOptions(nodes=1, stages=2, stages_per_worker=2), 8, "8"),
        (ClusterOptions(nodes=2, stages=2), 8, "2"),
        (ClusterOptions(nodes=2, stages=2), 3, None),
        (ClusterOptions(nodes=1, stages=5), 4, "4"),
        (ClusterOptions(nodes=4, stages=2), 2, None),
        (ClusterOptions(nodes=1, stages=2, devices=("cuda:0",)), 8, None),
        (ClusterOptions(nodes=1, stages=4, emulate="llama2-7b@a100"), 16, None),
    ],
)
def test_stage_workers_share_the_cores(options: ClusterOptions, num_cores: int, threads: str | None) -> None:
    assert set(settings_of(options, "LEMIX_NUM_THREADS", num_cores)) == {threads}
    assert set(settings_of(options, "OMP_WAIT_POLICY", num_cores)) == {"PASSIVE" if threads else None}
    assert f"compute threads of each: {threads or 1} " in layout_of(options, num_cores).line


@pytest.mark.parametrize(
    ("options", "num_workers", "held", "reason"),
    [
        (ClusterOptions(stages_per_worker=2), 2, 2, "as --stages-per-worker says"),
        (ClusterOptions(emulate="llama2-7b@a100"), 4, 1, "an emulated device has a process of its own"),
        (ClusterOptions(stages=1), 2, 1, "a node has one stage"),
        (ClusterOptions(), 4, 1, "a worker for each stage, which has cores of its own"),
        (ClusterOptions(stages=3), 2, 3, "a worker for each node, as there are fewer cores than stages"),
        (ClusterOptions(devices=("cuda:0", "cuda:1")), 2, 2, "a worker for each node, whose stages hand"),
    ],
)
def test_a_person_is_told_which_layout_was_picked_and_why(
    options: ClusterOptions, num_workers: int, held: int, reason: str
) -> None:
    line = layout_of(options, 4).line
    assert f"stage workers: {num_workers}, stages in each: {held}" in line
    assert f"({reason}" in line


def test_threads_that_the_person_has_set_stay() -> None:
    inherited = {**INHERITED, "LEMIX_NUM_THREADS": "3"}
    specs = specs_of(ClusterOptions(nodes=1, stages=2), inherited, num_cores=8)
    assert specs["node-0-stage-0"].environment["LEMIX_NUM_THREADS"] == "3"


def test_the_run_overrides_what_the_launcher_inherited_and_keeps_the_rest(tmp_path: Path) -> None:
    options = ClusterOptions(runs_dir=tmp_path, name="n", policy="least_loaded", extra_env={"EXTRA": "1"})
    specs = specs_of(options)
    for spec in specs.values():
        assert spec.environment["LEMIX_RUN_DIR"] == str(tmp_path / "n")
        assert spec.environment["LEMIX_NATS_URL"] == "nats://127.0.0.1:1"
        assert spec.environment["LEMIX_LEARNING_RATE"] == "0.5"
        assert spec.environment["PATH"] == "/bin"
        assert spec.environment["EXTRA"] == "1"
        assert "LEMIX_MODEL" not in spec.environment
    assert specs["gateway"].environment["LEMIX_PORT"] == "8123"
    assert specs["scheduler"].environment["LEMIX_POLICY"] == "least_loaded"


def test_emulated_stages_and_the_scheduler_are_told_the_same_profile() -> None:
    specs = specs_of(ClusterOptions(nodes=1, stages=4, emulate="llama2-7b@a100"))
    assert specs["scheduler"].environment["LEMIX_PROFILE"] == "llama2-7b@a100"
    assert specs["scheduler"].environment["LEMIX_NUM_STAGES"] == "4"
    assert specs["node-0-stage-1"].environment["LEMIX_EMULATE"] == "llama2-7b@a100"
    computing = specs_of(ClusterOptions(nodes=1, stages=2))
    assert "LEMIX_PROFILE" not in computing["scheduler"].environment
    assert "LEMIX_EMULATE" not in computing["node-0-stage-0"].environment


def test_libraries_of_stage_workers_start_no_threads_of_their_own_unless_told_otherwise() -> None:
    options = ClusterOptions(nodes=1, stages=1, model="some/model")
    assert specs_of(options)["node-0-stage-0"].environment["OMP_NUM_THREADS"] == "1"
    assert specs_of(options)["node-0-stage-0"].environment["LEMIX_MODEL"] == "some/model"
    assert "OMP_NUM_THREADS" not in specs_of(options)["gateway"].environment
    chosen = specs_of(options, {**INHERITED, "OMP_NUM_THREADS": "4"})
    assert chosen["node-0-stage-0"].environment["OMP_NUM_THREADS"] == "4"


def test_a_node_on_other_devices_is_told_its_profile() -> None:
    profiles = {1: "llama2-7b@h200"}
    emulated = specs_of(ClusterOptions(nodes=2, stages=2, emulate="llama2-7b@a100", node_profiles=profiles))
    assert emulated["node-0-stage-0"].environment["LEMIX_EMULATE"] == "llama2-7b@a100"
    assert emulated["node-1-stage-0"].environment["LEMIX_EMULATE"] == "llama2-7b@h200"
    computing = specs_of(ClusterOptions(nodes=2, stages=1, node_profiles=profiles))
    assert "LEMIX_NODE_PROFILE" not in computing["node-0-stage-0"].environment
    assert computing["node-1-stage-0"].environment["LEMIX_NODE_PROFILE"] == "llama2-7b@h200"


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (ClusterOptions(nodes=0), "nodes=0"),
        (ClusterOptions(stages=-1), "stages=-1"),
        (ClusterOptions(devices=()), "device"),
        (ClusterOptions(stages_per_worker=0), "stages_per_worker=0"),
        (ClusterOptions(port=70000), "port=70000"),
        (ClusterOptions(name="../other"), "'../other' is no name of a run"),
        (ClusterOptions(name=""), "'' is no name of a run"),
        (ClusterOptions(emulate="llama2-7b"), "llama2-7b"),
        (ClusterOptions(nodes=2, node_profiles={2: "llama2-7b@a100"}), "2=llama2-7b@a100: there are 2 nodes"),
        (ClusterOptions(nodes=2, node_profiles={1: "llama2-7b"}), "llama2-7b"),
        (ClusterOptions(emulate="llama2-70b@a100", stages=4), "do not fit into 4 stages"),
    ],
)
def test_a_wrong_option_is_named(options: ClusterOptions, fault: str) -> None:
    with pytest.raises(ConfigurationError, match=fault):
        options.validate()


@pytest.mark.parametrize(
    ("options", "inherited", "merge"),
    [
        (ClusterOptions(nodes=2), {}, "average"),
        (ClusterOptions(nodes=2), {"LEMIX_MERGE": "none"}, "none"),
        (ClusterOptions(nodes=2, extra_env={"LEMIX_MERGE": "outer"}), {}, "outer"),
        (ClusterOptions(nodes=1), {}, None),
        (ClusterOptions(nodes=2, emulate="llama2-7b@a100"), {}, None),
    ],
)
def test_several_nodes_are_one_model_unless_told_otherwise(
    options: ClusterOptions, inherited: dict[str, str], merge: str | None
) -> None:
    merges = {spec.environment.get("LEMIX_MERGE") for spec in specs_of(options, inherited).values()}
    assert merges == {merge}


def test_emulated_devices_are_not_guarded() -> None:
    emulated = specs_of(ClusterOptions(emulate="llama2-7b@a100"))["trainer"]
    assert emulated.environment["LEMIX_GUARD_SAMPLES"] == "0"
    assert "LEMIX_GUARD_SAMPLES" not in specs_of(ClusterOptions())["trainer"].environment
