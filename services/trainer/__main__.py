"""`python -m services.trainer`"""

import asyncio
from functools import partial

from services.trainer.service import Trainer
from services.trainer.settings import TrainerSettings
from shared.bus.permissions import Role
from shared.lifecycle import World, load_settings, run_service


def main() -> None:
    """Run the trainer until a signal."""
    settings = load_settings(TrainerSettings)

    async def train(world: World) -> None:
        make = partial(
            Trainer,
            settings,
            bus=world.bus,
            clock=world.clock,
            telemetry=world.telemetry,
            health=world.health,
        )
        await (await asyncio.to_thread(make)).run()

    run_service("trainer", Role.TRAINER, settings, train)


if __name__ == "__main__":
    main()
