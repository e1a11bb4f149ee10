"""What a stage's computing leaves behind when it cannot be done."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from services.stage_worker.compute.slices import finish
from services.stage_worker.compute.stage_compute import StageCompute
from shared.errors import StaleTensorError
from shared.messages.training import Microbatch
from shared.tensors.ref import TensorRef


class Gone:
    """A handoff to which the first tensor never came, or came with other rows."""

    def __init__(self) -> None:
        self.discarded: list[TensorRef] = []

    def receive_rows(self, ref: TensorRef, num_rows: int, hidden_size: int) -> Tensor:
        raise StaleTensorError(ref.place)

    def discard(self, ref: TensorRef) -> None:
        self.discarded.append(ref)


def ref(place: str) -> TensorRef:
    return TensorRef(carrier="shm", shape=(2, 8), dtype="float32", size_bytes=64, place=place)


@pytest.mark.parametrize("reference", [ref("reference"), None])
def test_activations_of_the_reference_free_their_slot_when_the_others_cannot_be_taken(
    reference: TensorRef | None,
) -> None:
    handoff = Gone()
    nothing: Any = SimpleNamespace()
    loaded: Any = SimpleNamespace(stage=SimpleNamespace(hidden_size=8, layers=None))
    compute = StageCompute(
        loaded,
        nothing,
        device=nothing,
        source=nothing,
        handoff=handoff,  # type: ignore[arg-type]
        copies=nothing,
        streams=nothing,
        timer=nothing,
    )
    microbatch: Microbatch = SimpleNamespace(lengths=(1, 1))  # type: ignore[assignment]
    with pytest.raises(StaleTensorError, match="hidden"):
        finish(compute.forward(microbatch, ref("hidden"), reference))
    assert handoff.discarded == ([] if reference is None else [reference])
