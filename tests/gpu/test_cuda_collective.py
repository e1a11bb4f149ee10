"""The mean over a group with NCCL: one member a GPU, on two GPUs where there are two."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from shared.tensors.collective import CollectiveGroup
from shared.tensors.rendezvous import host_store, join_store, store_address

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def test_members_on_gpus_get_the_mean() -> None:
    members = range(min(2, torch.cuda.device_count()))
    address = store_address(store := host_store("127.0.0.1", timeout_s=60.0))

    def merge(member: int) -> torch.Tensor:
        device = torch.device("cuda", member)
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
