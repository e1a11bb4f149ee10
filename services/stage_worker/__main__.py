"""Start one stage worker: `LEMIX_NODE=0 LEMIX_STAGE=0 LEMIX_NUM_STAGES=2 python -m services.stage_worker`."""

import sys
from typing import Any

from services.stage_worker.compute.executor import Executor
from services.stage_worker.settings import StageWorkerSettings
from services.stage_worker.worker import StageWorker
from shared.clock import Clock
from shared.lifecycle import World, load_settings, run_service

SWITCH_INTERVAL_S = 0.0005
"""The event loop shares the interpreter with the compute thread and must not wait 5 ms for it."""


def main() -> None:
    """Run a stage worker with settings from the environment; torch or an emulation is its executor."""
    settings = load_settings(StageWorkerSettings)
    sys.setswitchinterval(SWITCH_INTERVAL_S)

    async def serve(world: World) -> None:
        instance = world.ids.new("stage")
        own, executor = _executor(settings, instance, world.clock)
        await StageWorker(
            settings=own,
            instance=instance,
            bus=world.bus,
            clock=world.clock,
            telemetry=world.telemetry,
            executor=executor,
        ).run()

    run_service(f"stage_worker.{settings.node}.{settings.stage}", settings, serve)


def _executor(
    settings: StageWorkerSettings, instance: str, clock: Clock
) -> tuple[StageWorkerSettings, Executor[Any, Any]]:
    """The executor, and the settings with what its device has to say to them."""
    if settings.emulate:
        from services.stage_worker.compute.emulation import emulated_executor, emulated_settings

        own = emulated_settings(settings)
        return own, emulated_executor(own, instance, clock)
    # Here: torch takes seconds to load, which an emulated stage need not wait.
    from services.stage_worker.compute.torch_executor import TorchExecutor

    return settings, TorchExecutor(settings, instance)


if __name__ == "__main__":
    main()
