"""The times that a run promises its requests. Pure."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

from shared.profiles.profile import Profile

WhenLate = Literal["refuse", "serve_last"]

DEFAULT_SLO_FACTOR = 5.0
"""The objective in forward times of a lone prompt, as in the paper."""


@dataclass(frozen=True, slots=True)
class MeanPrompt:
    """A prompt of mean length."""

    num_tokens: int
    forward_s: float
    """One forward of it through the whole model, alone."""

    @classmethod
    def of(cls, profile: Profile) -> Self:
        """The prompt that the profile takes for the mean."""
        tokens = profile.reference_tokens
        return cls(tokens, profile.model_forward_s(tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class Objectives:
    """The objectives of a run; a request may bring its own (`shared.messages.inference.Objective`)."""

    slo_factor: float = DEFAULT_SLO_FACTOR
    """A first token is due after so many forwards of its prompt, or of a prompt of mean length if that is
    longer. It holds where no time is set."""
    ttft_s: float | None = None
    """A first token is due after so long, and `ttft_per_token_s` for each token of its prompt."""
    ttft_per_token_s: float = 0.0
    tbt_s: float | None = None
    """The next token is due after so long; None: there is no objective for that."""
    when_late: WhenLate | None = None
    """Whether requests that cannot be in time are refused. None: if somebody has set a time."""

    def first_token_s(self, num_tokens: int, mean: MeanPrompt, forward_s: Callable[[int], float]) -> float:
        """When the first token of a prompt of that length is due after its arrival.

        `forward_s`: seconds of one forward of so many tokens.
        """
        if self.ttft_s is not None:
            return self.ttft_s + num_tokens * self.ttft_per_token_s
        if num_tokens <= mean.num_tokens:
            return self.slo_factor * mean.forward_s
        return self.slo_factor * forward_s(num_tokens)

    @property
    def refuses_late(self) -> bool:
        """Whether a request that cannot be in time is refused, if it does not say itself what it wants."""
        return self.when_late == "refuse" or (self.when_late is None and self.ttft_s is not None)


DEFAULT_OBJECTIVES = Objectives()
