"""Copies of a stage's state through two small buffers, beside the compute thread."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from services.stage_worker.checkpoint.staging import CpuLane, StateCopies

CHUNK_BYTES = 12
DEADLINE_S = 30.0


class SlowLane(CpuLane):
    """Bytes arrive only when they are waited for, as on a stream."""

    def __init__(self) -> None:
        self.num_under_way = 0
        self.most_under_way = 0
        self.may_arrive = threading.Event()

    def send(self, source: Tensor, buffer: Tensor) -> Callable[[], object]:
        self.num_under_way += 1
        self.most_under_way = max(self.most_under_way, self.num_under_way)

        def arrive() -> None:
            assert self.may_arrive.wait(DEADLINE_S)
            buffer.copy_(source)
            self.num_under_way -= 1

        return arrive


def copies(to_host: Callable[[Tensor], Tensor], tensors: list[Tensor]) -> list[Tensor]:
    return [to_host(tensor) for tensor in tensors]


@pytest.mark.parametrize("lane", [CpuLane, SlowLane])
def test_tensors_of_any_kind_arrive_whole_with_two_chunks_under_way(lane: type[CpuLane]) -> None:
    tensors = [
        torch.arange(35, dtype=torch.float32).view(5, 7),
        torch.arange(9).to(torch.bfloat16),
        torch.tensor(3.5),
        torch.empty(0, 4),
        torch.arange(200, dtype=torch.uint8),
        torch.nn.Parameter(torch.randn(3)),
    ]
    made = lane()
    state = StateCopies(made, chunk_bytes=CHUNK_BYTES)
    copying = state.start(lambda to_host: copies(to_host, tensors))
    if isinstance(made, SlowLane):
        made.may_arrive.set()
    copied = copying.result(DEADLINE_S)
    state.close()
    for one, other in zip(copied, tensors, strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert not other.numel() or one.data_ptr() != other.data_ptr()
    if isinstance(made, SlowLane):
        assert (made.most_under_way, made.num_under_way) == (2, 0)


def test_who_changes_the_state_waits_for_its_copy() -> None:
    lane, weight = SlowLane(), torch.zeros(50)
    state = StateCopies(lane, chunk_bytes=CHUNK_BYTES)
    copying = state.start(lambda to_host: to_host(weight))

    def step() -> None:
        state.settle()
        weight.add_(1)

    stepping = threading.Thread(target=step)
    stepping.start()
    assert weight.sum() == 0
    lane.may_arrive.set()
    stepping.join(DEADLINE_S)
    state.close()
    assert copying.result(DEADLINE_S).sum() == 0
    assert weight.sum() == 50


def test_an_error_of_a_copy_is_told_to_whoever_wants_it_and_ends_no_step() -> None:
    def fail(to_host: Callable[[Tensor], Tensor]) -> Tensor:
        raise MemoryError("no room")

    state = StateCopies(CpuLane())
    copying = state.start(fail)
    state.settle()
    state.close()
    with pytest.raises(MemoryError, match="no room"):
        copying.result(DEADLINE_S)
