"""The record of a completion that is over: its metrics and its span. Lengths, never text."""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from opentelemetry.trace import Span

from services.gateway.access.keys import ServiceClass
from services.gateway.http.errors import ApiError, ClientGoneError
from services.gateway.metrics import Metrics, Outcome
from services.gateway.punctuality import ChoiceTimes, is_in_time
from shared.errors import LemixError
from shared.messages.inference import Placed

log = logging.getLogger(__name__)


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
        service_class: ServiceClass,
        on_first_tokens: Callable[[FirstTokens], None],
    ) -> None:
        """`arrived_s` and all later times are monotonic seconds of one clock."""
        self._metrics = metrics
        self._span = span
        self._arrived_s = arrived_s
        self._service_class: ServiceClass = service_class
        self._choices = [ChoiceTimes() for _ in range(num_choices)]
        self._num_without_token = num_choices
        self._nodes: set[int] = set()
        self._on_first_tokens = on_first_tokens
        self.num_tokens = 0
        """Tokens generated so far."""
        metrics.running.inc()

    def token(self, index: int, at_s: float, node: int) -> None:
        """A choice's next token has come from a node."""
        self.num_tokens += 1
        choice = self._choices[index]
        is_first = choice.ttft_s is None
        choice.add(at_s, self._arrived_s)
        if is_first:
            self._metrics.ttft_s.observe(at_s - self._arrived_s)
            self._first_token(at_s, node)
        else:
            self._metrics.tbt_s.observe(choice.gaps_s[-1])

    def end(
        self,
        *,
        at_s: float,
        num_prompt_tokens: int,
        placed: Sequence[Placed | None],
        error: LemixError | None,
    ) -> None:
        """The completion is over, whole or (`error`) not. `placed`: the scheduler's answer to each choice."""
        outcome = _outcome(error)
        self._metrics.running.dec()
        self._metrics.ended(outcome, self._service_class, is_in_time(self._choices, placed))
        self._metrics.request_s.observe(at_s - self._arrived_s)
        self._metrics.prompt_tokens.inc(num_prompt_tokens)
        self._metrics.completion_tokens.inc(self.num_tokens)
        self._span.set_attribute("gen_ai.usage.input_tokens", num_prompt_tokens)
        self._span.set_attribute("gen_ai.usage.output_tokens", self.num_tokens)
        self._span.set_attribute("lemix.outcome", outcome)
        self._span.end()
        log.info("%s request %s%s", self._service_class, outcome, _told(self._choices, placed))

    def _first_token(self, at_s: float, node: int) -> None:
        self._num_without_token -= 1
        self._nodes.add(node)
        if self._num_without_token == 0:
            self._on_first_tokens(FirstTokens(self._arrived_s, at_s, tuple(self._nodes)))


def _outcome(error: LemixError | None) -> Outcome:
    match error:
        case None:
            return "completed"
        case ClientGoneError():
            return "cancelled"
        case ApiError(status=429):
            return "refused"
        case _:
            return "failed"


def _told(choices: Sequence[ChoiceTimes], placed: Sequence[Placed | None]) -> str:
    """The times of the choices that have a token, for the log."""
    return "".join(
        f"; first token after {times.ttft_s:.3f} s{_due(due)}"
        for times, due in zip(choices, placed, strict=True)
        if times.ttft_s is not None
    )


def _due(placed: Placed | None) -> str:
    return "" if placed is None or placed.ttft_s is None else f", due after {placed.ttft_s:.3f} s"
