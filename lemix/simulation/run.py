"""One simulated run: from plain options to what happened and what it amounts to."""

import random
from functools import partial

from lemix.simulation.cluster import SimulationOptions, simulated_cluster
from lemix.simulation.drive import DriveOptions, drive
from lemix.simulation.loop import run_virtual
from lemix.simulation.metrics import RunMetrics, metrics_of
from lemix.simulation.nodes import Compute, nothing
from lemix.simulation.record import RunRecord
from lemix.simulation.workload import Workload, WorkloadOptions, plan
from services.scheduler.objectives import MeanPrompt
from services.trainer.settings import TrainerSettings
from shared.profiles.profile import profile_named


def simulate(options: SimulationOptions, workload: WorkloadOptions) -> tuple[RunRecord, RunMetrics]:
    """Run a workload in virtual time; the same options give the same run.

    Raises ConfigurationError naming the option that is wrong.
    """
    record = simulated(options, planned(workload, options.seed))
    return record, measured(record, options)


def measured(record: RunRecord, options: SimulationOptions) -> RunMetrics:
    """The metrics of a run on that cluster, by its objectives."""
    return metrics_of(record, slo_s=slo_s(options), objective_s=partial(objective_s, options))


def simulated(options: SimulationOptions, workload: Workload, compute: Compute = nothing) -> RunRecord:
    """Run this very workload in virtual time, on devices that also `compute`.

    Raises ConfigurationError naming the option that is wrong.
    """
    return run_virtual(_drive(options, workload, compute))


def planned(workload: WorkloadOptions, seed: int) -> Workload:
    """The workload of a seed, whatever it runs on."""
    return plan(workload, random.Random(f"workload {seed}"))


def slo_s(options: SimulationOptions) -> float:
    """The objective for the first token of a prompt of mean length."""
    profile = profile_named(options.profile, options.stages)
    return objective_s(options, profile.reference_tokens)


def objective_s(options: SimulationOptions, num_tokens: int) -> float:
    """The objective for a prompt's first token: of the profile alone, so the same for every policy."""
    profile = profile_named(options.profile, options.stages)
    return options.objectives.first_token_s(num_tokens, MeanPrompt.of(profile), profile.model_forward_s)


def drive_options(options: SimulationOptions) -> DriveOptions:
    """How the driver follows what the trainer does."""
    microbatches = TrainerSettings.given(**options.trainer_settings).microbatches
    return DriveOptions(schedule=options.schedule, microbatches=microbatches)


async def _drive(options: SimulationOptions, workload: Workload, compute: Compute) -> RunRecord:
    async with simulated_cluster(options, compute) as world:
        return await drive(world, workload, drive_options(options))
