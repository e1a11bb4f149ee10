"""Profiles: what a model's stages take on a kind of device, computed or read from a file.

`llama2-7b@a100` is computed; a file is what `lemix profile` wrote.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pydantic import ValidationError

from shared.documents import Document
from shared.errors import ConfigurationError
from shared.profiles.computed import computed_stage
from shared.profiles.devices import DEVICES, DeviceLimits, device_limits
from shared.profiles.fit import FittedTimes
from shared.profiles.models import MODELS, ModelShape, model_shape
from shared.profiles.records import StageProfile
from shared.profiles.roofline import TRAINED_BYTES, USABLE_MEMORY, Roofline, rooflines
from shared.profiles.times import StageTimes, Work, work_of_rows

REFERENCE_TOKENS = 150
"""A task of the paper's workload: HH-RLHF's prompts have 95 tokens in the mean, their answers some 55."""


class Profile(Document):
    """All stages of one model on one kind of device."""

    model: str
    device: str
    num_stages: int
    vocab_size: int
    context_length: int
    reference_tokens: int
    """A task's mean length, prompt and answer: objectives refer to it."""
    stages: tuple[StageProfile, ...]

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values fit a node, on its fullest stage."""
        return min(stage.memory.kv_tokens for stage in self.stages)

    def model_forward_s(self, num_tokens: int) -> float:
        """One sequence alone through all stages, on the devices: hops and waiting are not in it."""
        work = work_of_rows(0, num_tokens)
        return sum(fitted.seconds(work) for stage in self.stages if (fitted := stage.fitted("iteration")))


@lru_cache(maxsize=32)
def profile_named(name: str, num_stages: int | None) -> Profile:
    """`MODEL@DEVICE` of `models` and `devices`, or a file, which a process reads once.

    `num_stages` None: what a file was measured with; else the smallest power of two from 2 with which
    weights, gradients and the optimizer's state fit into the devices.

    Raises:
        ConfigurationError: there is no such profile, or not for so many stages.
    """
    if _is_file(name):
        return _measured(name, num_stages)
    model, device = _model_and_device(name)
    stages = _fitting_stages(model, device, name, num_stages)
    return Profile(
        model=name.partition("@")[0],
        device=name.partition("@")[2],
        num_stages=len(stages),
        vocab_size=model.vocab_size,
        context_length=model.context_length,
        reference_tokens=REFERENCE_TOKENS,
        stages=tuple(map(computed_stage, stages)),
    )


@lru_cache(maxsize=128)
def stage_times(name: str, stage: int, num_stages: int) -> StageTimes:
    """The times that an emulated device keeps: a roofline exactly, or the fit of measured points.

    A file's last stage has its backward in `forward_s`, and none in `backward_s`; a roofline has both apart.

    Raises:
        ConfigurationError: as `profile_named`.
    """
    if _is_file(name):
        return MeasuredTimes.of(_measured(name, num_stages).stages[stage])
    return rooflines(*_model_and_device(name), num_stages)[stage]


@dataclass(frozen=True, slots=True)
class MeasuredTimes:
    """Implements `StageTimes` from what was measured."""

    iteration: FittedTimes
    forward: FittedTimes
    backward: FittedTimes | None
    """None on the last stage: its `forward` includes its backward."""
    applied_s: float

    @classmethod
    def of(cls, stage: StageProfile) -> "MeasuredTimes":
        iteration, forward = stage.fitted("iteration"), stage.fitted("forward")
        assert iteration is not None and forward is not None, "read_profile has looked"
        return cls(iteration, forward, stage.fitted("backward"), stage.step_s)

    def iteration_s(self, work: Work) -> float:
        return self.iteration.seconds(work)

    def forward_s(self, work: Work) -> float:
        return self.forward.seconds(work)

    def backward_s(self, work: Work) -> float:
        return self.backward.seconds(work) if self.backward is not None else 0.0

    def step_s(self) -> float:
        return self.applied_s


def _is_file(name: str) -> bool:
    return name.endswith(".json") or "/" in name


def _measured(name: str, num_stages: int | None) -> Profile:
    profile = read_profile(Path(name))
    if num_stages not in (None, profile.num_stages):
        raise ConfigurationError(
            f"profile {name!r} was measured with {profile.num_stages} stages, not {num_stages}"
        )
    return profile


def read_profile(path: Path) -> Profile:
    """Read a profile. Raises ConfigurationError, naming the file and its first fault."""
    try:
        profile = Profile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"profile {str(path)!r}: {error.strerror}") from error
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise ConfigurationError(f"profile {str(path)!r}: {where}: {fault['msg']}") from error
    if not all(stage.samples("iteration") and stage.samples("forward") for stage in profile.stages):
        raise ConfigurationError(f"profile {str(path)!r}: a stage lacks iterations or forwards")
    if not all(stage.samples("backward") for stage in profile.stages[:-1]):
        raise ConfigurationError(f"profile {str(path)!r}: a stage before the last lacks backwards")
    if len(profile.stages) != profile.num_stages:
        raise ConfigurationError(
            f"profile {str(path)!r}: num_stages={profile.num_stages}, but it has {len(profile.stages)} stages"
        )
    return profile


def _model_and_device(name: str) -> tuple[ModelShape, DeviceLimits]:
    model, separator, device = name.partition("@")
    if not separator:
        raise ConfigurationError(
            f"profile {name!r} is neither a .json file nor MODEL@DEVICE with"
            f" MODEL of {', '.join(MODELS)} and DEVICE of {', '.join(DEVICES)}"
        )
    return model_shape(model), device_limits(device)


def _fitting_stages(
    model: ModelShape, device: DeviceLimits, name: str, num_stages: int | None
) -> tuple[Roofline, ...]:
    counts = (
        [2**power for power in range(1, model.num_layers.bit_length())]
        if num_stages is None
        else [num_stages]
    )
    for count in counts:
        stages = rooflines(model, device, count)
        if max(stage.num_params for stage in stages) * TRAINED_BYTES <= USABLE_MEMORY * device.memory_bytes:
            return stages
    raise ConfigurationError(
        f"profile {name!r}: the model and its training state do not fit into"
        f" {' or '.join(map(str, counts))} stages"
    )
