"""Which carrier a stage offers to another, and what it offers when that is refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from services.stage_worker.compute.handoff import SLOTS_PER_STAGE, SPARE_SLOTS, Handoff
from services.stage_worker.compute.local_stages import LocalStages
from services.stage_worker.settings import StageWorkerSettings
from shared.errors import CarrierError
from shared.messages.cluster import LinkAnswer, LinkOffer
from shared.tensors.gpu_memory import FindGpu, gpu_named
from shared.tensors.ref import TensorRef
from tests.support.played_gpu import PlayedGpu

CPU = torch.device("cpu")


@contextmanager
def handoff(
    folder: Path, stage: int, *, find_gpu: FindGpu = gpu_named, local: LocalStages | None = None
) -> Iterator[Handoff]:
    """Of a stage of two; it sees the shared memory of `folder`."""
    settings = StageWorkerSettings.given(node=0, stage=stage, num_stages=2, shm_dir=folder)
    one = Handoff(settings, f"instance-{stage}", CPU, local or LocalStages(), find_gpu)
    yield one
    one.close()


def offered(producer: Handoff) -> LinkOffer:
    return producer.offer(1, "instance-1", "activations", hidden_size=8, vocab_size=99)


def carriers_until_accepted(producer: Handoff, consumer: Handoff) -> list[str]:
    """The carriers of all offers; by the last one a tensor comes over."""
    found, answer = [], LinkAnswer(accepted=False)
    while not answer.accepted:
        offer = offered(producer)
        found.append(offer.carrier)
        answer = consumer.accept(offer)
        producer.connect(1, "activations", answer)
    sent = torch.rand(5, 8)
    assert torch.equal(consumer.receive(producer.put(1, sent)), sent)
    return found


@pytest.mark.parametrize(
    ("consumer_gpu", "has_same_memory", "carriers"),
    [
        ("GPU-0", True, ["cuda_ipc"]),
        ("GPU-1", True, ["cuda_ipc", "shm"]),
        ("GPU-0", False, ["cuda_ipc", "shm", "collective"]),
    ],
)
def test_the_cheapest_carrier_that_both_have(
    consumer_gpu: str, has_same_memory: bool, carriers: list[str], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    gpu, other = PlayedGpu("GPU-0"), PlayedGpu(consumer_gpu)
    other.memory, other.events = gpu.memory, gpu.events
    with (
        handoff(tmp_path / "here", 0, find_gpu=gpu.find) as producer,
        handoff(tmp_path / "here" if has_same_memory else elsewhere, 1, find_gpu=other.find) as consumer,
    ):
        (tmp_path / "here").mkdir()
        assert carriers_until_accepted(producer, consumer) == carriers
    assert list((tmp_path / "here").iterdir()) == []


def test_a_gpu_whose_memory_cannot_be_shared_is_passed_over(tmp_path: Path) -> None:
    gpu = PlayedGpu(is_shareable=False)
    with (
        handoff(tmp_path, 0, find_gpu=gpu.find) as producer,
        handoff(tmp_path, 1, find_gpu=gpu.find) as consumer,
    ):
        assert carriers_until_accepted(producer, consumer) == ["shm"]


@pytest.mark.parametrize("is_local", [False, True])
def test_of_two_tensors_neither_keeps_its_room_when_there_is_none_for_the_other(
    is_local: bool, tmp_path: Path
) -> None:
    local = LocalStages()
    if is_local:
        local.enter("instance-1", "cpu")
    with handoff(tmp_path, 0, local=local) as producer, handoff(tmp_path, 1, local=local) as consumer:
        carriers_until_accepted(producer, consumer)
        link = producer._outgoing[1, "activations"]
        put, refused = link.put, torch.zeros(2, 8)

        def put_but_one(tensor: torch.Tensor) -> TensorRef:
            if tensor is refused:
                raise CarrierError("no room")
            return put(tensor)

        link.put = put_but_one  # type: ignore[method-assign]
        taken_back = 2 * (SLOTS_PER_STAGE * 2 + SPARE_SLOTS)
        for _ in range(taken_back):
            with pytest.raises(CarrierError, match="no room"):
                producer.put_both(1, torch.ones(2, 8), refused)
        both = producer.put_both(1, torch.ones(2, 8), torch.full((2, 8), 2.0))
        assert [consumer.receive(ref).mean().item() for ref in both] == [1.0, 2.0]
    if is_local:
        assert not any(local.tensors._unread.values())
        local.leave("instance-1")


def test_stages_of_one_process_need_no_memory(tmp_path: Path) -> None:
    local = LocalStages()
    local.enter("instance-1", "cpu")
    with handoff(tmp_path, 0, local=local) as producer, handoff(tmp_path, 1, local=local) as consumer:
        assert carriers_until_accepted(producer, consumer) == ["local"]
    local.leave("instance-1")
