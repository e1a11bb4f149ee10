"""Checks a run for faults that can be known before anything is started."""

from collections.abc import Mapping

from lemix.adapter_choice import memory_bytes, with_suitable_adapter
from lemix.arenas import default_base
from lemix.devices import check_devices, num_cpu_cores
from lemix.topology import ClusterOptions, service_specs
from services.gateway.settings import GatewaySettings
from services.scheduler.__main__ import serving
from services.scheduler.settings import SchedulerSettings
from services.stage_worker.settings import StageWorkerSettings
from services.trainer.settings import TrainerSettings
from shared import checkpoints
from shared.chat_template_files import load_chat_template
from shared.clock import SystemClock
from shared.model.partition import partition
from shared.model_files import CONFIG_FILES, approximate_num_weights, name_of, num_layers, read_card, resolve
from shared.settings import LemixSettings, read_settings


def check_start(options: ClusterOptions, inherited: Mapping[str, str]) -> None:
    """Read the settings as each service will, and look for the model and the devices.

    Blocks: a model of the hub has its config fetched. Raises ConfigurationError or UnsupportedModelError,
    naming the value that is wrong.
    """
    options.validate()
    told = environments(options, inherited)
    serving(read_settings(SchedulerSettings, told.pop("scheduler")))
    gateway = read_settings(GatewaySettings, told.pop("gateway"))
    read_settings(TrainerSettings, told.pop("trainer"))
    workers = [read_settings(StageWorkerSettings, environment) for environment in told.values()]
    if options.emulate is None:
        check_devices(stage.device for worker in workers for stage in worker.of_stages)
    check_model(workers[0].model, None if options.emulate else options.stages)
    load_chat_template(resolve(gateway.model, CONFIG_FILES), SystemClock(), chosen=gateway.chat_template)


def with_fitting_adapter(options: ClusterOptions, inherited: Mapping[str, str]) -> tuple[ClusterOptions, str]:
    """Choose LoRA where all weights cannot learn on the run's devices, or an adapter has learnt before.

    Returns why; empty where all weights learn, or somebody has chosen.

    Blocks; raises ConfigurationError when the model's config cannot be read.
    """
    settings = read_settings(LemixSettings, environments(options, inherited)["trainer"])
    num_weights = approximate_num_weights(resolve(settings.model, CONFIG_FILES))
    root = settings.checkpoint_dir
    newest = next(filter(None, (checkpoints.latest(root, node) for node in checkpoints.nodes(root))), None)
    trained = newest.manifest.adapter if newest else None
    return with_suitable_adapter(options, inherited, num_weights, memory_bytes, trained)


def environments(options: ClusterOptions, inherited: Mapping[str, str]) -> dict[str, Mapping[str, str]]:
    """The environment of each service, by its name, but for addresses that are known only at the start."""
    specs = service_specs(
        options,
        nats_url=options.nats_url or "",
        nats_users=None,
        port=options.port,
        shm_dir=default_base(),
        num_cores=num_cpu_cores(),
        inherited=inherited,
    )
    return {spec.name: spec.environment for spec in specs}


def check_model(model: str, num_stages: int | None) -> None:
    """Look for a model, and whether it can have so many stages (None: as an emulated model has).

    Raises ConfigurationError or UnsupportedModelError, naming the value that is wrong.
    """
    folder = resolve(model, CONFIG_FILES)
    read_card(folder, name_of(model))
    layers = num_layers(folder)
    if num_stages is not None and layers is not None:
        partition(layers, num_stages)
