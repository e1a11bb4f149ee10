"""Every placement policy by its name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from services.scheduler.policies.base import Policy
from services.scheduler.policies.least_loaded import LeastLoaded
from services.scheduler.policies.lemix import Lemix
from services.scheduler.policies.lemix_options import LemixOptions
from services.scheduler.policies.lemix_released import LemixReleased, ReleasedOptions
from services.scheduler.policies.memory import TrainingRoom
from services.scheduler.policies.options import Options, parse_options, split_name
from services.scheduler.policies.random import RandomNode
from services.scheduler.policies.round_robin import RoundRobin
from services.scheduler.policies.separate import Separate, SeparateOptions
from shared.errors import ConfigurationError

Rng = Callable[[], float]
"""Uniform in [0, 1)."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """A policy: its options, and how it is made."""

    options: type[Options]
    make: Callable[[Any, Rng, TrainingRoom | None], Policy]


POLICIES: Mapping[str, _Kind] = {
    "least_loaded": _Kind(Options, lambda options, rng, room: LeastLoaded(options)),
    "lemix": _Kind(LemixOptions, lambda options, rng, room: Lemix(options, room)),
    "lemix_released": _Kind(ReleasedOptions, lambda options, rng, room: LemixReleased(options)),
    "random": _Kind(Options, lambda options, rng, room: RandomNode(options, rng)),
    "round_robin": _Kind(Options, lambda options, rng, room: RoundRobin(options)),
    "separate": _Kind(SeparateOptions, lambda options, rng, room: Separate(options)),
}


def policy_named(text: str, rng: Rng, room: TrainingRoom | None = None) -> Policy:
    """The policy written as `name` or `name:key=value,key=value` (docs/policy.md).

    `room`: what a node can hold of activations, where it is known. Raises ConfigurationError, naming the
    choices, when there is no such policy, option or value.
    """
    name, written = split_name(text)
    if name not in POLICIES:
        raise ConfigurationError(f"policy {name!r} is unknown; choose one of: {', '.join(POLICIES)}")
    kind = POLICIES[name]
    return kind.make(parse_options(name, kind.options, written), rng, room)


def uses_profile(policy: Policy) -> bool:
    """Whether costs may start from a profile; not for `lemix:without=profile`, which has them learned."""
    return policy.uses_profile if isinstance(policy, Lemix) else True
