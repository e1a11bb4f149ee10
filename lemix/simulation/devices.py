"""The emulated devices under a node of a simulated cluster."""

from collections.abc import Iterable
from dataclasses import dataclass

from shared.errors import ConfigurationError
from shared.profiles.profile import Profile, profile_named, stage_times
from shared.profiles.times import StageTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """The devices under the stages of a node, and the model that they run."""

    times: tuple[StageTimes, ...]
    """By stage."""
    vocab_size: int
    context_length: int
    kv_tokens: int
    name: str = ""
    """The name by which a node tells the scheduler its profile."""
    profile: Profile | None = None
    """The scheduler's profile of them, and their memory. None: it learns, and memory is endless."""


def devices_named(name: str, num_stages: int | None) -> Devices:
    """Devices as the profile says. Raises ConfigurationError when there is no such profile."""
    profile = profile_named(name, num_stages)
    stages = range(profile.num_stages)
    return Devices(
        times=tuple(stage_times(name, stage, profile.num_stages) for stage in stages),
        vocab_size=profile.vocab_size,
        context_length=profile.context_length,
        kv_tokens=profile.kv_tokens,
        name=name,
        profile=profile,
    )


def check_one_model(devices: Devices, others: Iterable[Devices]) -> None:
    """Raises ConfigurationError, naming both, when a node would run another model than the first."""
    for other in others:
        facts = (other.vocab_size, other.context_length, len(other.times))
        if facts != (devices.vocab_size, devices.context_length, len(devices.times)) or (
            devices.profile and other.profile and devices.profile.model != other.profile.model
        ):
            named = [each.profile.model if each.profile else "unnamed" for each in (devices, other)]
            raise ConfigurationError(
                f"nodes must run one model in the same stages, not {' and '.join(named)}"
            )
