"""Start one stage worker: `LEMIX_NODE=0 LEMIX_STAGE=0 LEMIX_NUM_STAGES=2 python -m services.stage_worker`."""

import sys

from services.stage_worker.executor.torch import TorchExecutor
from services.stage_worker.service import StageWorker
from services.stage_worker.settings import StageWorkerSettings
from shared.lifecycle import World, load_settings, run_service

SWITCH_INTERVAL_S = 0.0005
"""The event loop shares the interpreter with the compute thread and must not wait 5 ms for it."""


def main() -> None:
    """Settings from the environment, torch as the executor."""
    settings = load_settings(StageWorkerSettings)
    sys.setswitchinterval(SWITCH_INTERVAL_S)

    async def serve(world: World) -> None:
        instance = world.ids.new("stage")
        await StageWorker(
            settings=settings,
            instance=instance,
            bus=world.bus,
            clock=world.clock,
            telemetry=world.telemetry,
            executor=TorchExecutor(settings, instance),
        ).run()

    run_service(f"stage_worker.{settings.node}.{settings.stage}", settings, serve)


if __name__ == "__main__":
    main()
