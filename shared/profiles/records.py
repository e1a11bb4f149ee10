"""One stage in a profile: measured points of its ops, and the memory that it needs on its device."""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

from pydantic import Field, model_validator

from shared.documents import Document
from shared.messages.events import OpKind
from shared.profiles.devices import PCIE_4_BYTES_PER_S
from shared.profiles.fit import FittedTimes, fitted_times
from shared.profiles.old_points import completed
from shared.profiles.times import Work


class ProfilePoint(Document):
    """How long one op took. The last stage's `forward` includes its backward, as the op does."""

    kind: OpKind
    num_tokens: int = Field(ge=1)
    num_pairs: int = Field(ge=1)
    num_sequences: int = Field(ge=1)
    num_context_tokens: int = Field(ge=1)
    elapsed_s: float = Field(gt=0)

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, point: Any) -> Any:
        return completed(point) if isinstance(point, dict) else point

    @classmethod
    def of(cls, kind: OpKind, work: Work, elapsed_s: float) -> "ProfilePoint":
        """The point of an op of this size."""
        return cls(
            kind=kind,
            num_tokens=work.num_tokens,
            num_pairs=work.num_pairs,
            num_sequences=work.num_sequences,
            num_context_tokens=work.num_context_tokens,
            elapsed_s=elapsed_s,
        )

    @property
    def work(self) -> Work:
        return Work(self.num_tokens, self.num_pairs, self.num_sequences, self.num_context_tokens)


class StageMemory(Document):
    """The memory that a stage needs on its device, and the memory of the device."""

    weights_bytes: int
    training_bytes: int
    """Gradients and the optimizer's state."""
    kv_bytes_per_token: int
    activation_bytes_per_token: int
    """Bytes of a training forward, until its backward."""
    capacity_bytes: int
    """Bytes that a stage may use in all."""
    host_bytes_per_s: int = Field(default=PCIE_4_BYTES_PER_S, gt=0)
    """Bandwidth from and to the host's memory."""

    @property
    def kv_tokens(self) -> int:
        """Tokens whose keys and values fit into half of what weights and training leave.

        The other half is for activations. At least 1.
        """
        return max(1, self._half_bytes // self.kv_bytes_per_token)

    @property
    def activation_tokens(self) -> int:
        """Rows of microbatches in flight whose activations fit into the other half."""
        return max(0, self._half_bytes // self.activation_bytes_per_token)

    def offload_s(self, num_tokens: int) -> float:
        """Seconds that the activations of so many rows take to the host, or back."""
        return num_tokens * self.activation_bytes_per_token / self.host_bytes_per_s

    @property
    def load_s(self) -> float:
        """Seconds that the weights take from the host."""
        return self.weights_bytes / self.host_bytes_per_s

    @property
    def _half_bytes(self) -> int:
        return (self.capacity_bytes - self.weights_bytes - self.training_bytes) // 2


class StageProfile(Document):
    """One stage of the pipeline."""

    points: tuple[ProfilePoint, ...]
    step_s: float
    memory: StageMemory
    num_layers: int = Field(default=1, ge=1)
    """1 in files that do not tell."""

    def samples(self, kind: OpKind) -> tuple[tuple[Work, float], ...]:
        return tuple((point.work, point.elapsed_s) for point in self.points if point.kind == kind)

    def fitted(self, kind: OpKind) -> FittedTimes | None:
        """None: the stage has no such op."""
        if kind not in self._fits:
            self._fits[kind] = _fitted(self.samples(kind))
        return self._fits[kind]

    @cached_property
    def _fits(self) -> dict[OpKind, FittedTimes | None]:
        """Those that were asked for: an objective asks for every prompt, and points are many."""
        return {}


@lru_cache(maxsize=256)
def _fitted(samples: Sequence[tuple[Work, float]]) -> FittedTimes | None:
    return fitted_times(samples) if samples else None
