"""Every placement policy by its name."""

from services.scheduler.policies.base import Policy
from services.scheduler.policies.least_loaded import LeastLoaded
from services.scheduler.policies.round_robin import RoundRobin
from shared.errors import ConfigurationError

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (RoundRobin, LeastLoaded)}


def policy_named(name: str) -> Policy:
    """Raises ConfigurationError, naming the choices, when there is no such policy."""
    if name not in POLICIES:
        raise ConfigurationError(f"policy {name!r} is unknown; choose one of: {', '.join(sorted(POLICIES))}")
    return POLICIES[name]()
