"""Times with noise, against the times without, and against what a lognormal factor must be."""

import math
from statistics import fmean, stdev

import pytest

from lemix.simulation.cluster import SimulationOptions
from lemix.simulation.device_noise import DeviceNoise
from lemix.simulation.record import RunRecord
from lemix.simulation.run import simulate
from lemix.simulation.workload import WorkloadOptions
from shared.profiles.profile import stage_times
from shared.profiles.times import work_of_rows

TIMES, WORK = stage_times("llama2-7b@a100", 0, 2), work_of_rows(0, 150)


def test_factors_spread_by_sigma_around_one() -> None:
    noisy = DeviceNoise(0.05, bias=0.0, seed=0).on(TIMES, node=0, stage=0)
    for exact_s, draw in (
        (TIMES.iteration_s(WORK), lambda: noisy.iteration_s(WORK)),
        (TIMES.forward_s(WORK), lambda: noisy.forward_s(WORK)),
        (TIMES.backward_s(WORK), lambda: noisy.backward_s(WORK)),
        (TIMES.step_s(), noisy.step_s),
    ):
        factors = [draw() / exact_s for _ in range(4000)]
        assert fmean(factors) == pytest.approx(1, abs=0.005)
        assert stdev(map(math.log, factors)) == pytest.approx(0.05, rel=0.05)


def test_no_noise_is_the_device_itself() -> None:
    assert DeviceNoise(0.0, bias=0.0, seed=0).on(TIMES, node=0, stage=0) is TIMES


def run(device_noise: float) -> RunRecord:
    options = SimulationOptions(
        nodes=2, profile="gpt2-small@rtx6000ada", policy="round_robin", device_noise=device_noise, seed=1
    )
    return simulate(options, WorkloadOptions(num_tasks=20, rate_per_s=30.0))[0]


def test_devices_of_a_run_have_noise_of_their_own_from_its_seed() -> None:
    noisy, again, exact = run(0.05), run(0.05), run(0.0)
    assert list(noisy.ops) == list(again.ops) != list(exact.ops)
    steps_s = {(op.node, op.stage, op.end_s - op.start_s) for op in noisy.ops if op.kind == "step"}
    assert len(steps_s) == sum(op.kind == "step" for op in noisy.ops)
    assert [each.arrived_s for each in noisy.requests] == [each.arrived_s for each in exact.requests]
