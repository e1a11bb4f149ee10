"""Settings of the scheduler."""

from pydantic import Field

from services.scheduler.objectives import DEFAULT_SLO_FACTOR, Objectives, WhenLate
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
    """A first token is due after so many forwards of its prompt, or of a mean one if that is longer."""
    ttft_s: float | None = Field(default=None, gt=0)
    """A first token is due after so long, instead; None: by `slo_factor`."""
    ttft_per_token_s: float = Field(default=0.0, ge=0)
    """Added to `ttft_s` for each token of the prompt."""
    tbt_s: float | None = Field(default=None, gt=0)
    """The next token is due after so long; None: there is no objective for that."""
    when_late: WhenLate | None = None
    """`refuse` or `serve_last`, for requests that cannot be in time; None: `refuse` with `ttft_s`."""
    schedule: ScheduleName = "async"
    """How the trainer feeds batches; the same for both."""

    @property
    def objectives(self) -> Objectives:
        return Objectives(
            slo_factor=self.slo_factor,
            ttft_s=self.ttft_s,
            ttft_per_token_s=self.ttft_per_token_s,
            tbt_s=self.tbt_s,
            when_late=self.when_late,
        )
