"""Settings of the scheduler."""

from pydantic import Field

from services.scheduler.state import DEFAULT_SLO_FACTOR
from shared.schedule import ScheduleName
from shared.settings import LemixSettings


class SchedulerSettings(LemixSettings):
    """Read from LEMIX_* environment variables."""

    policy: str = "lemix"
    """How tasks are placed: `name` or `name:key=value,key=value` (see `policies.POLICIES`)."""
    profile: str = ""
    """Name or file of a profile, which costs start from; empty: learned from what stages tell."""
    num_stages: int | None = Field(default=None, ge=1)
    """Stages of each node, where the profile is for any number of them; None: the profile's default."""
    costs: str = "affine"
    """The model that predicts how long stages take (see `costs.COSTS`)."""
    hop_s: float = Field(default=0.0005, ge=0)
    """The time that a message takes from one service to another."""
    slo_factor: float = Field(default=DEFAULT_SLO_FACTOR, gt=0)
    """The objective for the time to first token, in forward times of a lone prompt of mean length."""
    schedule: ScheduleName = "async"
    """How the trainer feeds batches; the same for both."""
