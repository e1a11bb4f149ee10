"""The summary of a demo run: the numbers of runs/demo/summary.json. Pure."""

import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from lemix.load import Outcome


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Requests(_Part):
    sent: int
    chat: int
    """The number of requests sent by chat, among all that were sent."""
    completed: int
    failed: int


class Percentiles(_Part):
    """Seconds; None when nothing was measured."""

    p50: float | None
    p99: float | None


class Training(_Part):
    batches_published: int
    batches_applied: int
    optimizer_steps: int
    """That batches took part in, summed over the nodes."""
    tokens_per_s: float
    """Tokens of applied batches, from the first publish to the last step."""


class ServedLoss(_Part):
    """Negative log-likelihood per token of held-out text, in nats, measured through the API."""

    before: float
    after: float


class WeightsVersion(_Part):
    """Lowest version that produced a token of the load, and highest."""

    first: int | None
    last: int | None


class Summary(_Part):
    """All that a demo measured."""

    requests: Requests
    ttft_s: Percentiles
    tbt_s: Percentiles
    completion_tokens_per_s: float
    training: Training
    served_loss: ServedLoss
    weights_version: WeightsVersion
    wall_s: float

    def faults(self) -> list[str]:
        """List everything that broke a promise; empty when nothing did."""
        found = []
        if self.requests.failed:
            found.append(f"{self.requests.failed} of {self.requests.sent} requests failed")
        if self.training.batches_applied != self.training.batches_published:
            applied, published = self.training.batches_applied, self.training.batches_published
            found.append(f"{applied} of {published} training batches were applied")
        if not self.served_loss.after < self.served_loss.before:
            before, after = self.served_loss.before, self.served_loss.after
            found.append(f"the served loss did not fall: {before:.3f} before, {after:.3f} after")
        return found


def percentile(values: Sequence[float], fraction: float) -> float | None:
    """The smallest value that at least `fraction` of all values do not exceed; None for no values."""
    if not values:
        return None
    ranked = sorted(values)
    return ranked[max(0, math.ceil(fraction * len(ranked)) - 1)]


def percentiles(values: Sequence[float]) -> Percentiles:
    return Percentiles(p50=percentile(values, 0.50), p99=percentile(values, 0.99))


def summarise(
    outcomes: Sequence[Outcome],
    *,
    load_s: float,
    wall_s: float,
    training: Training,
    served_loss: ServedLoss,
) -> Summary:
    """Put the measurements of one run together; `load_s` is how long requests were being answered."""
    done = [outcome.completion for outcome in outcomes if outcome.completion is not None]
    versions = [version for completion in done for version in completion.weights_versions]
    return Summary(
        requests=Requests(
            sent=len(outcomes),
            chat=sum(outcome.request.is_chat for outcome in outcomes),
            completed=len(done),
            failed=len(outcomes) - len(done),
        ),
        ttft_s=percentiles([completion.ttft_s for completion in done]),
        tbt_s=percentiles([gap_s for completion in done for gap_s in completion.tbt_s]),
        completion_tokens_per_s=sum(completion.completion_tokens for completion in done) / load_s,
        training=training,
        served_loss=served_loss,
        weights_version=WeightsVersion(first=min(versions, default=None), last=max(versions, default=None)),
        wall_s=wall_s,
    )
