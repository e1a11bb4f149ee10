"""Every service as a process: what it loads, and how it says that its settings are wrong."""

import os
import subprocess
import sys

import pytest

PLACE = {"LEMIX_NODE": "0", "LEMIX_STAGE": "0", "LEMIX_NUM_STAGES": "1"}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("service", ["gateway", "scheduler", "trainer"])
def test_services_without_tensors_never_load_torch(service: str) -> None:
    program = (
        f"import sys, services.{service}.__main__; print({{'torch', 'transformers'}} & set(sys.modules))"
    )
    assert run("-c", program).stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("service", "variable", "value"),
    [
        ("gateway", "LEMIX_PORT", "http"),
        ("scheduler", "LEMIX_LOG_LEVEL", "LOUD"),
        ("trainer", "LEMIX_MICROBATCHES", "0"),
        ("stage_worker", "LEMIX_STAGE", "-1"),
    ],
)
def test_a_wrong_setting_is_one_line_and_status_1(service: str, variable: str, value: str) -> None:
    done = run(
        "-m", f"services.{service}", **(PLACE | {variable: value, "LEMIX_NATS_URL": "nats://127.0.0.1:1"})
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert variable in line
    assert value in line
