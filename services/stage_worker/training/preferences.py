"""Direct preference optimization: the weights learn to give one answer rather than another.

The loss of a pair of answers, preferred y and other z, to an input x is

    -log sigmoid(beta * ((log p(y|x) - log r(y|x)) - (log p(z|x) - log r(z|x))))

with p of the weights that train and r of a reference: the model as it was given (Rafailov et al. 2023, eq. 7,
https://arxiv.org/abs/2305.18290).

Shape letters: R rows that have a label, N sequences, which are pairs with the preferred answer first.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn import functional

from services.stage_worker.compute.weights import WeightsVersion
from shared.messages.training import Microbatch


class Reference:
    """The weights of the model as it was given: read when they are first needed, and kept until `drop`.

    An adapter that changes nothing stands for the model without it.
    """

    def __init__(self, read: Callable[[], Mapping[str, Tensor]]) -> None:
        """`read`: gives the stage's trained weights as they were before any training, by name; it blocks."""
        self._read = read
        self._version: WeightsVersion | None = None

    @property
    def version(self) -> WeightsVersion:
        """Version 0, of which nothing requires gradients."""
        if self._version is None:
            self._version = WeightsVersion(0, self._read())
            for leaf in self._version.leaves.values():
                leaf.requires_grad_(False)
        return self._version

    def drop(self) -> None:
        """Give back the memory."""
        self._version = None


def answer_logprobs(logprobs_R: Tensor, microbatch: Microbatch) -> Tensor:
    """The log-probability [N] of each answer, in nats: the sum over its labels."""
    return torch.stack([each.sum() for each in torch.split(logprobs_R, _num_labels(microbatch))])


def preference_loss(answers_N: Tensor, reference_N: Tensor, beta: float) -> Tensor:
    """The sum [] over the pairs of their losses, from the log-probabilities of their answers."""
    gained_N = answers_N - reference_N
    return -functional.logsigmoid(beta * (gained_N[0::2] - gained_N[1::2])).sum()


def _num_labels(microbatch: Microbatch) -> list[int]:
    """How many labels each sequence has."""
    ends = (bisect_left(microbatch.label_rows, end) for end in accumulate(microbatch.lengths))
    return [end - start for start, end in pairwise((0, *ends))]
