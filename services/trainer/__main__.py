"""`python -m services.trainer`"""

from services.trainer.service import Trainer
from services.trainer.settings import TrainerSettings
from shared.lifecycle import World, run_service


def main() -> None:
    """Run the trainer until a signal."""
    settings = TrainerSettings()

    async def train(world: World) -> None:
        await Trainer(settings, bus=world.bus, clock=world.clock, telemetry=world.telemetry).run()

    run_service("trainer", settings, train)


if __name__ == "__main__":
    main()
