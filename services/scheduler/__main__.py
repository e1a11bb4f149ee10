"""`python -m services.scheduler`: places every task on a node."""

from services.scheduler.policies import policy_named
from services.scheduler.service import Scheduler
from services.scheduler.settings import SchedulerSettings
from shared.lifecycle import World, load_settings, run_service


async def serve(world: World, settings: SchedulerSettings) -> None:
    await Scheduler(world, policy_named(settings.policy)).run()


def main() -> None:
    settings = load_settings(SchedulerSettings)
    run_service("scheduler", settings, lambda world: serve(world, settings))


if __name__ == "__main__":
    main()
