"""The mean over a group with NCCL, a GPU for each member; and over one whose members share a GPU."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from shared.tensors.collective import CollectiveGroup
from shared.tensors.rendezvous import host_store, join_store, store_address

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_members_with_a_gpu_each_get_the_mean() -> None:
    check_the_mean([torch.device("cuda", number) for number in range(2)])


def test_a_member_alone_on_its_gpu_keeps_what_it_has() -> None:
    """NCCL runs there, too, though it has nobody to send to."""
    check_the_mean([torch.device("cuda", 0)])


def test_members_that_share_a_gpu_get_the_mean() -> None:
    check_the_mean([torch.device("cuda", 0)] * 2)


def check_the_mean(devices: list[torch.device]) -> None:
    members = range(len(devices))
    address = store_address(store := host_store("127.0.0.1", timeout_s=60.0))

    def merge(member: int) -> torch.Tensor:
        device = devices[member]
        torch.cuda.set_device(device)  # of this thread
        group = CollectiveGroup(
            join_store(address, timeout_s=60.0),
            "merge",
            member=member,
            members=members,
            device=device,
            timeout_s=60.0,
            bucket_bytes=4000,
        )
        flat = torch.arange(10_000.0, device=device) * (member + 1)
        group.mean_(flat, 1.0)
        return flat.cpu()

    with ThreadPoolExecutor(len(members)) as threads:
        merged = list(threads.map(merge, members))
    factor = sum(member + 1 for member in members) / len(members)
    for flat in merged:
        assert torch.equal(flat, torch.arange(10_000.0) * factor)
    del store
