"""Settings of the scheduler."""

from shared.settings import LemixSettings


class SchedulerSettings(LemixSettings):
    """Read from LEMIX_* environment variables."""

    policy: str = "round_robin"
    """Name of the placement policy (see `policies.POLICIES`)."""
