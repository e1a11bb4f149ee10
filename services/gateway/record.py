"""The record of a completion that is over: its metrics and its span. Lengths, never text."""

from collections.abc import Callable
from typing import NamedTuple

from opentelemetry.trace import Span

from services.gateway.http.errors import ClientGoneError
from services.gateway.metrics import Metrics
from shared.errors import LemixError


class FirstTokens(NamedTuple):
    """Each choice of a request has its first token; times are monotonic seconds of one clock."""

    arrived_s: float
    at_s: float
    nodes: tuple[int, ...]
    """Those that made them."""


class Record:
    """The times and counts of one completion."""

    def __init__(
        self,
        metrics: Metrics,
        span: Span,
        *,
        arrived_s: float,
        num_choices: int,
        on_first_tokens: Callable[[FirstTokens], None],
    ) -> None:
        """`arrived_s` and all later times are monotonic seconds of one clock."""
        self._metrics = metrics
        self._span = span
        self._arrived_s = arrived_s
        self._last_token_s: list[float | None] = [None] * num_choices
        self._num_without_token = num_choices
        self._nodes: set[int] = set()
        self._on_first_tokens = on_first_tokens
        self.num_tokens = 0
        """Tokens generated so far."""
        metrics.running.inc()

    def token(self, index: int, at_s: float, node: int) -> None:
        """A choice's next token has come from a node."""
        self.num_tokens += 1
        last_s, self._last_token_s[index] = self._last_token_s[index], at_s
        if last_s is None:
            self._metrics.ttft_s.observe(at_s - self._arrived_s)
            self._first_token(at_s, node)
        else:
            self._metrics.tbt_s.observe(at_s - last_s)

    def end(self, *, at_s: float, num_prompt_tokens: int, error: LemixError | None) -> None:
        """The completion is over, whole or (`error`) not."""
        outcome = _outcome(error)
        self._metrics.running.dec()
        self._metrics.requests.labels(outcome).inc()
        self._metrics.request_s.observe(at_s - self._arrived_s)
        self._metrics.prompt_tokens.inc(num_prompt_tokens)
        self._metrics.completion_tokens.inc(self.num_tokens)
        self._span.set_attribute("gen_ai.usage.input_tokens", num_prompt_tokens)
        self._span.set_attribute("gen_ai.usage.output_tokens", self.num_tokens)
        self._span.set_attribute("lemix.outcome", outcome)
        self._span.end()

    def _first_token(self, at_s: float, node: int) -> None:
        self._num_without_token -= 1
        self._nodes.add(node)
        if self._num_without_token == 0:
            self._on_first_tokens(FirstTokens(self._arrived_s, at_s, tuple(self._nodes)))


def _outcome(error: LemixError | None) -> str:
    if error is None:
        return "completed"
    return "cancelled" if isinstance(error, ClientGoneError) else "failed"
