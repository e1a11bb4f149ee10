"""Start one stage worker: `LEMIX_NODE=0 LEMIX_STAGE=0 LEMIX_NUM_STAGES=2 python -m services.stage_worker`."""

from services.stage_worker.executor.torch import TorchExecutor
from services.stage_worker.service import StageWorker
from services.stage_worker.settings import StageWorkerSettings
from shared.lifecycle import World, run_service


def main() -> None:
    """Settings from the environment, torch as the executor."""
    settings = StageWorkerSettings()

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
