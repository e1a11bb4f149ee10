"""An emulated device: its room, its facts, and how it waits."""

import subprocess
import sys
from pathlib import Path

import pytest

from services.stage_worker.compute.emulation import emulated_executor, emulated_settings
from services.stage_worker.compute.hold import Hold
from services.stage_worker.settings import StageWorkerSettings
from shared.clock import SystemClock
from shared.errors import ConfigurationError
from shared.profiles.profile import profile_named


def settings(**more: object) -> StageWorkerSettings:
    return StageWorkerSettings(node=0, stage=1, num_stages=2, emulate="llama2-7b@a100", **more)


def test_the_emulated_device_says_how_much_it_holds() -> None:
    own = emulated_settings(settings())
    assert own.kv_tokens == profile_named("llama2-7b@a100", 2).kv_tokens
    assert own.device == "llama2-7b@a100"


def test_what_a_person_sets_goes_first() -> None:
    assert emulated_settings(settings(kv_tokens=160)).kv_tokens == 160


def test_an_unknown_device_is_the_user_s_mistake() -> None:
    with pytest.raises(ConfigurationError, match="abacus"):
        emulated_settings(settings().model_copy(update={"emulate": "llama2-7b@abacus"}))


async def test_tokens_are_of_the_served_model_and_the_context_is_the_profile_s() -> None:
    facts = await emulated_executor(settings(), "me", SystemClock()).load()
    assert (facts.vocab_size, facts.context_length) == (4096, 4096)


def test_torch_is_not_loaded() -> None:
    modules = "services.stage_worker.__main__, services.stage_worker.compute.emulation"
    script = f"import sys, {modules}; print('torch' in sys.modules)"
    root = Path(__file__).parents[3]
    ran = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


class Steps:
    """A clock that only sleeping moves, and never by all that was asked for."""

    def __init__(self) -> None:
        self.at_s = 0.0

    def now_s(self) -> float:
        return self.at_s

    def wall_s(self) -> float:
        return self.at_s

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.at_s += max(0.6 * seconds, 0.001)


async def test_a_hold_ends_when_the_clock_says_so() -> None:
    clock = Steps()
    wait = Hold(clock, clock.sleep)
    await wait.until(0.5)
    assert 0.5 <= clock.at_s < 0.502
    await wait.until(0.25)
    assert clock.at_s < 0.502
