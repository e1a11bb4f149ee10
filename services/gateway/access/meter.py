"""The use of one key, against its limits."""

from services.gateway.access.keys import Key
from services.gateway.access.rate_limit import Bucket
from services.gateway.http.errors import rate_limited
from shared.clock import Clock


class Meter:
    """Counts the requests and the tokens of one key, as far as it has limits for them."""

    def __init__(self, key: Key, clock: Clock) -> None:
        self._clock = clock
        limits = {"requests": key.requests_per_minute, "tokens": key.tokens_per_minute}
        now_s = clock.now_s()
        self._buckets = {
            unit: Bucket.full(limit, now_s) for unit, limit in limits.items() if limit is not None
        }

    def count_request(self) -> None:
        """Count a request. Raises ApiError (429) when it is one too many."""
        self._take("requests", 1)

    def count_prompt(self, num_tokens: int) -> None:
        """Count a prompt as its request begins. Raises ApiError (429) while it is too much."""
        self._take("tokens", num_tokens)

    def count_completion(self, num_tokens: int) -> None:
        """Count a completion at its end. Its length is not known before, so later requests wait for it."""
        if "tokens" in self._buckets:
            self._buckets["tokens"] = self._now("tokens").without(num_tokens)

    def headers(self) -> dict[str, str]:
        """The headers that tell what is left, as OpenAI's do."""
        told = {}
        for unit in self._buckets:
            bucket = self._now(unit)
            told[f"x-ratelimit-limit-{unit}"] = str(bucket.per_minute)
            told[f"x-ratelimit-remaining-{unit}"] = str(max(0, int(bucket.left)))
            told[f"x-ratelimit-reset-{unit}"] = f"{bucket.reset_s:.3f}s"
        return told

    def _take(self, unit: str, amount: int) -> None:
        if unit not in self._buckets:
            return
        bucket = self._now(unit)
        wait_s = bucket.wait_s(amount)
        if wait_s > 0:
            message = f"rate limit reached: this key has {bucket.per_minute} {unit} a minute"
            raise rate_limited(message, refused_for="key", retry_after_s=wait_s)
        self._buckets[unit] = bucket.without(amount)

    def _now(self, unit: str) -> Bucket:
        return self._buckets[unit].at(self._clock.now_s())
