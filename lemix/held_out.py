"""How well the served weights predict held-out text, measured through the public API."""

from collections.abc import Callable, Sequence

from lemix.client import ApiClient


async def served_loss(
    api: ApiClient,
    lines: Sequence[str],
    *,
    nodes: int,
    on_scored: Callable[[int], None] = lambda number: None,
) -> float:
    """Negative log-likelihood per token over all `lines`, in nats.

    Every line is asked for once per node, one request at a time. On an idle cluster the policy `round_robin`
    then gives each line to each node, so that all replicas count alike.
    """
    nll_sum, num_tokens = 0.0, 0
    for line in lines:
        for _ in range(nodes):
            score = await api.score(line)
            nll_sum += score.nll_sum
            num_tokens += score.num_tokens
        on_scored(1)
    return nll_sum / num_tokens
