"""Costs against the emulated device they forecast, and against the paper's formula."""

import subprocess
import sys

import pytest

from services.scheduler.costs import AffineCosts, Costs, QuadraticCosts, costs_named
from shared.errors import ConfigurationError
from shared.profiles.profile import profile_named, stage_times
from shared.profiles.times import NO_WORK, work_of_rows

NAME = "llama2-7b@a100"
PROFILE = profile_named(NAME, 2)
HOP_S = 0.0005
MIXED = work_of_rows(0, 150) + work_of_rows(249, 1) * 20
"""A prompt of 150 tokens and 20 sequences that decode."""


def test_affine_says_what_the_emulated_device_takes() -> None:
    costs = AffineCosts(PROFILE, HOP_S)
    for stage in range(2):
        device = stage_times(NAME, stage, 2)
        assert costs.iteration_s(stage, MIXED) == pytest.approx(device.iteration_s(MIXED), rel=0.02)
        assert costs.step_s(stage) == device.step_s()


def test_the_last_stage_runs_its_backward_with_its_forward() -> None:
    costs = AffineCosts(PROFILE, HOP_S)
    work = work_of_rows(0, 150)
    first, last = stage_times(NAME, 0, 2), stage_times(NAME, 1, 2)
    assert costs.forward_s(0, work) == pytest.approx(first.forward_s(work), rel=0.02)
    assert costs.backward_s(0, work) == pytest.approx(first.backward_s(work), rel=0.02)
    assert costs.forward_s(1, work) == pytest.approx(last.forward_s(work) + last.backward_s(work), rel=0.02)
    assert costs.backward_s(1, work) == 0


def test_affine_follows_a_device_that_is_slower_than_its_profile() -> None:
    costs, work = AffineCosts(PROFILE, HOP_S), work_of_rows(0, 150)
    before_s = costs.iteration_s(0, work)
    for _ in range(200):
        costs.observe(0, "iteration", work, 1.5 * before_s)
    assert costs.iteration_s(0, work_of_rows(0, 30)) == pytest.approx(
        1.5 * AffineCosts(PROFILE, HOP_S).iteration_s(0, work_of_rows(0, 30)), rel=0.01
    )
    assert costs.iteration_s(1, work) == AffineCosts(PROFILE, HOP_S).iteration_s(1, work)


def test_one_interrupted_op_hardly_counts() -> None:
    costs, work = AffineCosts(PROFILE, HOP_S), work_of_rows(0, 150)
    before_s = costs.iteration_s(0, work)
    costs.observe(0, "iteration", work, 1000 * before_s)
    assert costs.iteration_s(0, work) <= 1.2 * before_s


def test_affine_learns_a_device_of_which_it_knows_nothing() -> None:
    costs, device = AffineCosts(None, HOP_S), stage_times(NAME, 0, 2)
    for index in range(512):
        work = work_of_rows(index, 1) * 8 if index % 2 else work_of_rows(0, 1 + index)
        costs.observe(0, "iteration", work, device.iteration_s(work))
        costs.observe(0, "step", NO_WORK, device.step_s())
    assert costs.iteration_s(0, work_of_rows(0, 200)) == pytest.approx(
        device.iteration_s(work_of_rows(0, 200)), rel=0.02
    )
    assert costs.iteration_s(0, work_of_rows(99, 1) * 8) == pytest.approx(
        device.iteration_s(work_of_rows(99, 1) * 8), rel=0.02
    )
    assert costs.step_s(0) == pytest.approx(device.step_s())


def test_whoever_knows_the_number_of_stages_says_which_is_the_last() -> None:
    costs = AffineCosts(None, HOP_S)
    assert costs.num_stages is None and costs.backward_s(1, work_of_rows(0, 10)) > 0
    costs.num_stages = 2
    assert costs.backward_s(1, work_of_rows(0, 10)) == 0 < costs.backward_s(0, work_of_rows(0, 10))


def test_quadratic_is_eta_times_batch_times_squared_length() -> None:
    costs = QuadraticCosts(None, HOP_S)
    assert costs.iteration_s(0, work_of_rows(0, 100)) == pytest.approx(2e-6 * 1 * 100**2)
    three = work_of_rows(0, 100) * 3
    assert costs.iteration_s(0, three) == pytest.approx(2e-6 * 3 * 100**2)
    assert costs.backward_s(0, three) == pytest.approx(1e-6 * 3 * 100**2)
    assert costs.step_s(0) == 0


def test_quadratic_takes_its_etas_from_the_first_that_runs() -> None:
    costs, work = QuadraticCosts(None, HOP_S), work_of_rows(0, 100)
    costs.observe(0, "iteration", work, 0.05)
    costs.observe(0, "iteration", work, 0.10)
    costs.observe(0, "backward", work, 0.02)
    costs.num_stages = 2
    assert costs.forward_s(0, work_of_rows(0, 200)) == pytest.approx(5e-6 * 200**2)
    assert costs.forward_s(1, work_of_rows(0, 200)) == pytest.approx((5e-6 + 2e-6) * 200**2)
    assert costs.backward_s(1, work) == 0


def test_quadratic_is_right_near_the_lengths_it_was_profiled_with_and_wrong_elsewhere() -> None:
    costs, device = QuadraticCosts(PROFILE, HOP_S), stage_times(NAME, 0, 2)
    reference, short = work_of_rows(0, 150), work_of_rows(0, 1)
    assert 0.5 < costs.iteration_s(0, reference) / device.iteration_s(reference) < 2
    assert costs.iteration_s(0, short) < device.iteration_s(short) / 1000


@pytest.mark.parametrize("name", ["affine", "quadratic"])
def test_costs_have_names(name: str) -> None:
    costs: Costs = costs_named(name, PROFILE, HOP_S)
    assert (costs.num_stages, costs.hop_s) == (2, HOP_S)


def test_an_unknown_name_is_the_user_s_mistake() -> None:
    with pytest.raises(ConfigurationError, match=r"linear.*affine, quadratic"):
        costs_named("linear", None, HOP_S)


def test_the_solver_of_fits_is_there_before_anything_runs() -> None:
    """Its import takes a tenth of a second, in which a scheduler would answer nobody."""
    script = """
import sys
from services.scheduler.costs import AffineCosts
before = "numpy" in sys.modules
AffineCosts(None, 0.0)
print(before, "numpy" in sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["False", "True"]
