"""Start a stage worker: `LEMIX_NODE=0 LEMIX_STAGE=0 LEMIX_NUM_STAGES=2 python -m services.stage_worker`."""

import sys

from services.stage_worker.process import MakeExecutor, StageProcess
from services.stage_worker.settings import StageWorkerSettings
from shared.bus.permissions import Role
from shared.clock import Clock
from shared.lifecycle import World, load_settings, run_service

SWITCH_INTERVAL_S = 0.0005
"""The event loop shares the interpreter with the compute threads and must not wait 5 ms for them."""


def main() -> None:
    """Run a stage worker with settings from the environment; torch or an emulation is its executor."""
    settings = load_settings(StageWorkerSettings)
    sys.setswitchinterval(SWITCH_INTERVAL_S)

    async def serve(world: World) -> None:
        stages, make_executor = _stages(settings, world.clock)
        await StageProcess(stages, world, make_executor).run()

    run_service(settings.process_name, Role.STAGE, settings, serve)


def _stages(settings: StageWorkerSettings, clock: Clock) -> tuple[list[StageWorkerSettings], MakeExecutor]:
    """Each stage's settings, with what its device has to say to them, and what makes its executor."""
    if settings.emulate:
        from services.stage_worker.compute.emulation import emulated_executor, emulated_settings

        stages = [emulated_settings(stage) for stage in settings.of_stages]
        return stages, lambda stage, instance: emulated_executor(stage, instance, clock)
    # Here: torch takes seconds to load, which an emulated stage need not wait.
    from services.stage_worker.compute.torch_executor import torch_executors

    return settings.of_stages, torch_executors()


if __name__ == "__main__":
    main()
