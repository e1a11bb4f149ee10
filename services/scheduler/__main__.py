"""`python -m services.scheduler`: places every task on a node."""

import random
import sys

from services.scheduler.costs import Costs, costs_named
from services.scheduler.objectives import MeanPrompt
from services.scheduler.policies import policy_named, uses_profile
from services.scheduler.policies.memory import TrainingRoom
from services.scheduler.service import Scheduler
from services.scheduler.settings import SchedulerSettings
from shared.bus.permissions import Role
from shared.errors import ConfigurationError
from shared.lifecycle import ServiceMain, World, load_settings, run_service
from shared.profiles.profile import profile_named
from shared.schedule import Feeding


def serving(settings: SchedulerSettings) -> ServiceMain:
    """The process's work. Raises ConfigurationError when a setting names something that does not exist."""
    profile = profile_named(settings.profile, settings.num_stages) if settings.profile else None
    room = TrainingRoom.of(profile) if profile else None
    policy = policy_named(settings.policy, random.SystemRandom().random, room)
    costs = costs_named(settings.costs, profile if uses_profile(policy) else None, settings.hop_s)

    def costs_of(name: str) -> Costs:
        if name == settings.profile or not uses_profile(policy):
            return costs
        return costs_named(settings.costs, profile_named(name, settings.num_stages), settings.hop_s)

    async def serve(world: World) -> None:
        await Scheduler(
            world,
            policy,
            costs=costs,
            costs_of=costs_of,
            objectives=settings.objectives,
            mean_prompt=MeanPrompt.of(profile) if profile else None,
            feeding=Feeding(schedule=settings.schedule),
        ).run()

    return serve


def main() -> None:
    settings = load_settings(SchedulerSettings)
    try:
        serve = serving(settings)
    except ConfigurationError as error:
        sys.exit(f"ERROR {error}")
    run_service("scheduler", Role.SCHEDULER, settings, serve)


if __name__ == "__main__":
    main()
