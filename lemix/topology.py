"""Which processes a local run consists of, and what each is told: a pure function of its options."""

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lemix.run_folder import check_run_name
from shared.addresses import nats_address
from shared.errors import ConfigurationError
from shared.profiles.profile import profile_named


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """A person's choices for a local run."""

    name: str = "default"
    """The run's files lie under `runs_dir`/`name`."""
    runs_dir: Path = Path("runs")
    nodes: int = 2
    stages: int = 2
    """Pipeline stages of each node."""
    stages_per_worker: int | None = None
    """Consecutive stages in one process; None: as `layout_of` picks."""
    devices: tuple[str, ...] = ("cpu",)
    """`cpu` or `cuda:N`, dealt out to the stages of node 0, then node 1, ...; repeated when short."""
    emulate: str | None = None
    node_profiles: Mapping[int, str] = field(default_factory=dict)
    """By node, where it has other devices than the scheduler's profile says, or than `emulate` says."""
    """A profile that the stages obey instead of computing: `llama2-7b@a100`, or a file."""
    model: str | None = None
    """A folder or a hub name; None: LEMIX_MODEL, or the embedded model."""
    policy: str | None = None
    """The scheduler's policy; None: LEMIX_POLICY, or the scheduler's own choice."""
    host: str = "127.0.0.1"
    port: int = 0
    """The API's port; 0: any free one."""
    root_path: str = ""
    """The API's path prefix behind a proxy."""
    insecure: bool = False
    """The API may listen where others reach it, although there are no keys."""
    nats_url: str | None = None
    """A running NATS server to use; None: start one."""
    nats_port: int | None = None
    """The port of the server that is started; None: the run's port, which is any free one the first time."""
    start_timeout_s: float = 600.0
    """When nothing answers after this, the start has failed."""
    extra_env: Mapping[str, str] = field(default_factory=dict)
    """Further settings for every service."""

    @property
    def is_on_cpus(self) -> bool:
        return set(self.devices) == {"cpu"}

    @property
    def run_dir(self) -> Path:
        return (self.runs_dir / self.name).absolute()

    def validate(self) -> None:
        """Check the options. Raises ConfigurationError, naming the option and its value."""
        if self.nodes < 1 or self.stages < 1:
            raise ConfigurationError(f"nodes={self.nodes} and stages={self.stages} must both be at least 1")
        if self.stages_per_worker is not None and self.stages_per_worker < 1:
            raise ConfigurationError(f"stages_per_worker={self.stages_per_worker} must be at least 1")
        if not self.devices:
            raise ConfigurationError("at least one device is needed, for example cpu or cuda:0")
        if not 0 <= self.port <= 65535:
            raise ConfigurationError(f"port={self.port} is not a port number")
        given = nats_address(self.nats_url) if self.nats_url else None
        if self.nats_port is not None and given:
            raise ConfigurationError(
                f"nats_port={self.nats_port} is for a server of the run's own, and {given} is given"
            )
        check_run_name(self.name)
        if self.emulate is not None:
            profile_named(self.emulate, self.stages)
        for node, name in self.node_profiles.items():
            if node >= self.nodes:
                raise ConfigurationError(f"node profile {node}={name}: there are {self.nodes} nodes")
            profile_named(name, self.stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceSpec:
    """One process to start."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the stages are dealt out to stage workers."""

    stages_held: int
    """The stages of each worker, but the last one of a node, which has what is left."""
    num_workers: int
    """Stage worker processes of all nodes."""
    num_threads: int
    """Compute threads of each worker: its share of the cores, one beside a GPU."""
    reason: str

    @property
    def line(self) -> str:
        """For a person."""
        return (
            f"stage workers: {self.num_workers}, stages in each: {self.stages_held}, "
            f"compute threads of each: {self.num_threads} ({self.reason})"
        )


def layout_of(options: ClusterOptions, num_cores: int) -> Layout:
    """The layout that the person chose, or the one that measures best."""
    chosen, reason = _stages_held(options, num_cores)
    held = min(chosen, options.stages)
    num_workers = options.nodes * -(-options.stages // held)
    computes_on_cpu = options.emulate is None and options.is_on_cpus
    num_threads = max(1, num_cores // num_workers) if computes_on_cpu else 1
    return Layout(stages_held=held, num_workers=num_workers, num_threads=num_threads, reason=reason)


def _stages_held(options: ClusterOptions, num_cores: int) -> tuple[int, str]:
    if options.stages_per_worker is not None:
        return options.stages_per_worker, "as --stages-per-worker says"
    if options.emulate is not None:
        return 1, "an emulated device has a process of its own"
    if options.stages == 1:
        return 1, "a node has one stage"
    if not options.is_on_cpus:
        return options.stages, "a worker for each node, whose stages hand tensors over on the GPUs"
    if options.nodes * options.stages <= num_cores:
        return 1, "a worker for each stage, which has cores of its own"
    return options.stages, "a worker for each node, as there are fewer cores than stages"


CommandOf = Callable[[str], tuple[str, ...]]
"""From a package under services/ to the command that runs it."""


def module_command(package: str) -> tuple[str, ...]:
    """Run a service with the interpreter that runs this."""
    return (sys.executable, "-m", f"services.{package}")


def service_specs(
    options: ClusterOptions,
    *,
    nats_url: str,
    nats_users: Path | None,
    port: int,
    shm_dir: Path,
    num_cores: int,
    inherited: Mapping[str, str],
    command_of: CommandOf = module_command,
) -> list[ServiceSpec]:
    """Every process of the run but NATS, in the order in which they start.

    `num_cores`: of this machine, for the stage workers to share. `inherited`: the launcher's environment;
    the run's settings override it.
    """
    common = {
        **_merge_settings(options),
        **inherited,
        **options.extra_env,
        **_common_settings(options, nats_url, nats_users),
    }

    def spec(name: str, package: str, settings: Mapping[str, str]) -> ServiceSpec:
        return ServiceSpec(name=name, command=command_of(package), environment={**common, **settings})

    specs = [
        spec("scheduler", "scheduler", _scheduler_settings(options)),
        spec("gateway", "gateway", _gateway_settings(options, port)),
        spec("trainer", "trainer", _trainer_settings(options)),
    ]
    layout = layout_of(options, num_cores)
    for node in range(options.nodes):
        for stage in range(0, options.stages, layout.stages_held):
            held = min(layout.stages_held, options.stages - stage)
            settings = _stage_settings(options, node, stage, held, shm_dir)
            if layout.num_threads > 1:
                settings["LEMIX_NUM_THREADS"] = common.get("LEMIX_NUM_THREADS", str(layout.num_threads))
                # Threads that spin at a barrier hold the core that the last one waits for.
                settings["OMP_WAIT_POLICY"] = common.get("OMP_WAIT_POLICY", "PASSIVE")
            # Threads of libraries beside the compute thread would only fight over the cores.
            settings["OMP_NUM_THREADS"] = common.get("OMP_NUM_THREADS", "1")
            specs.append(spec(_worker_name(node, stage, held), "stage_worker", settings))
    return specs


def _worker_name(node: int, stage: int, held: int) -> str:
    last = stage + held - 1
    return f"node-{node}-stage-{stage}" if held == 1 else f"node-{node}-stages-{stage}-{last}"


def _merge_settings(options: ClusterOptions) -> dict[str, str]:
    """Several nodes are one model unless someone wants them apart: the same question gets the same answer."""
    return {"LEMIX_MERGE": "average"} if options.nodes > 1 and options.emulate is None else {}


def _common_settings(options: ClusterOptions, nats_url: str, nats_users: Path | None) -> dict[str, str]:
    settings = {
        "LEMIX_NATS_URL": nats_url,
        "LEMIX_RUN_DIR": str(options.run_dir),
        "PYTHONUNBUFFERED": "1",
    }
    if nats_users is not None:
        settings["LEMIX_NATS_USERS"] = str(nats_users)
    if options.model is not None:
        settings["LEMIX_MODEL"] = options.model
    return settings


def _gateway_settings(options: ClusterOptions, port: int) -> dict[str, str]:
    chosen = {"LEMIX_ROOT_PATH": options.root_path, "LEMIX_INSECURE": "yes" if options.insecure else ""}
    set_ones = {name: value for name, value in chosen.items() if value}
    return {"LEMIX_HOST": options.host, "LEMIX_PORT": str(port), **set_ones}


def _scheduler_settings(options: ClusterOptions) -> dict[str, str]:
    chosen = {"LEMIX_POLICY": options.policy, "LEMIX_PROFILE": options.emulate}
    set_ones = {name: value for name, value in chosen.items() if value is not None}
    return {"LEMIX_NUM_STAGES": str(options.stages), **set_ones}


def _trainer_settings(options: ClusterOptions) -> dict[str, str]:
    """Emulated devices compute no losses, so that there is nothing to guard by."""
    return {} if options.emulate is None else {"LEMIX_GUARD_SAMPLES": "0"}


def _stage_settings(
    options: ClusterOptions, node: int, stage: int, held: int, shm_dir: Path
) -> dict[str, str]:
    first = node * options.stages + stage
    devices = [options.devices[place % len(options.devices)] for place in range(first, first + held)]
    profile = options.node_profiles.get(node)
    emulated = {"LEMIX_EMULATE": profile or options.emulate} if options.emulate is not None else {}
    told = {"LEMIX_NODE_PROFILE": profile} if profile else {}
    several = {"LEMIX_STAGES_HELD": str(held)} if held > 1 else {}
    num_stages_on = _num_stages_on(options)
    sharing = max(num_stages_on[device] for device in devices)
    shared = {"LEMIX_STAGES_ON_DEVICE": str(sharing)} if sharing > 1 else {}
    return {
        **emulated,
        **told,
        **several,
        **shared,
        "LEMIX_NODE": str(node),
        "LEMIX_STAGE": str(stage),
        "LEMIX_NUM_STAGES": str(options.stages),
        "LEMIX_DEVICE": devices[0] if len(set(devices)) == 1 else ",".join(devices),
        "LEMIX_SHM_DIR": str(shm_dir),
    }


def _num_stages_on(options: ClusterOptions) -> Counter[str]:
    """The stages of all nodes that share each device's memory."""
    dealt = (options.devices[place % len(options.devices)] for place in range(options.nodes * options.stages))
    return Counter(device for device in dealt if device != "cpu")
