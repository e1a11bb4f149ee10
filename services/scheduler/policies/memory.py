"""The room on a node: for keys and values of a request, and for activations of a batch."""

from collections.abc import Iterable
from dataclasses import dataclass
from heapq import nlargest
from typing import Self

from shared.messages.inference import InferenceTask
from shared.profiles.profile import Profile


@dataclass(frozen=True, slots=True)
class TrainingRoom:
    """Device memory that a node has for saved activations."""

    tokens: int
    """Rows of microbatches in flight whose activations fit on every stage."""

    @classmethod
    def of(cls, profile: Profile) -> Self:
        """The room on the fullest stage.

        It is half of the memory that weights and training leave: the KV cache has the other half.
        """
        return cls(min(stage.memory.activation_tokens for stage in profile.stages))


def kv_tokens_of(task: InferenceTask) -> int:
    """Most tokens of the request in the KV cache; the token produced last is never fed back."""
    return max(len(task.prompt), task.most_tokens - 1)


def activation_tokens(microbatch_tokens: Iterable[int], max_in_flight: int) -> int:
    """Most rows held at once: those of the largest microbatches that can be in flight."""
    return sum(nlargest(max_in_flight, microbatch_tokens))
