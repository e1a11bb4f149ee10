"""Whether what serves is what trains: the same tokens scored both ways. Pure."""

from collections.abc import Sequence
from math import isfinite

from shared.messages.inference import TokenLogprob

NUM_TOKENS = 8
_STRIDE = 7919
"""Spreads the tokens over the vocabulary."""
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.5}
"""By the dtype that stages compute in: how far two log-probabilities of one token may be apart, in nats.

The two forwards round at other places. With a chat model of 135 million weights on a CPU they were 3e-5
apart in float32, and the same in bfloat16. A GPU's kernels may differ more: that model's log-probabilities
are up to 0.24 from those in float32 when it computes in bfloat16.
"""


def tokens_to_score(vocab_size: int, context_length: int) -> tuple[int, ...]:
    """A few tokens, always the same for a model."""
    return tuple(number * _STRIDE % vocab_size for number in range(1, min(NUM_TOKENS, context_length) + 1))


def disagreement(trained: Sequence[float], served: Sequence[TokenLogprob], dtype: str) -> str:
    """How what serves differs from what trains; empty: it does not.

    `trained`: log-probabilities by the forward that trains; `served`: by the one that answers requests,
    for as many tokens.
    """
    pairs = zip(trained, (token.logprob for token in served), strict=True)
    gaps = [_gap(one, other) for one, other in pairs if other is not None]
    largest, tolerance = max(gaps, default=0.0), TOLERANCES.get(dtype, max(TOLERANCES.values()))
    if all(map(isfinite, gaps)) and largest <= tolerance:
        return ""
    return (
        f"a token's log-probability is {largest:.4g} from that of the forward that trains, more than "
        f"{tolerance:g} ({dtype})"
    )


def _gap(one: float, other: float) -> float:
    """How far they are apart; both may be minus infinity."""
    return 0.0 if one == other else abs(one - other)
