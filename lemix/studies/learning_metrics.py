"""The inference loss of a run, and how much the weights that answered had learnt. Pure."""

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from lemix.simulation.record import RequestRecord
from lemix.studies.rows import Metrics

LOSS = "inference_loss"
"""Mean over all requests of their loss, in nats a token."""
BATCHES_SERVED = "batches_in_answers"
"""Mean over the requests of the training batches in the weights that answered."""
NUM_PARTS = 10
"""Equal parts of the requests, in the order of arrival."""


def part_metric(number: int) -> str:
    """The name of the loss of one part of the requests, by its number from 0."""
    return f"{LOSS}_{number}"


def loss_metrics(requests: Sequence[RequestRecord]) -> Metrics:
    """The loss of all requests, which are in the order of arrival, and of each part of them."""
    edges = [len(requests) * number // NUM_PARTS for number in range(NUM_PARTS + 1)]
    by_part = {
        part_metric(number): _mean_loss(requests[start:end])
        for number, (start, end) in enumerate(pairwise(edges))
    }
    return {LOSS: _mean_loss(requests), BATCHES_SERVED: _mean_version(requests), **by_part}


def _mean_loss(requests: Sequence[RequestRecord]) -> float | None:
    losses = [loss for request in requests for loss in request.losses if loss is not None]
    return fmean(losses) if losses else None


def _mean_version(requests: Sequence[RequestRecord]) -> float | None:
    versions = [version for request in requests for version in request.versions if version is not None]
    return fmean(versions) if versions else None
