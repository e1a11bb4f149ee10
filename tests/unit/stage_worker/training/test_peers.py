"""How a stage keeps and changes the group that it is in: real gloo, each member in a thread."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from services.stage_worker.training.peers import Peers
from shared.errors import PeerLostError
from shared.messages.weights import MergeGroup, MergeMember


def peers(node: int, timeout_s: float = 60.0) -> Peers:
    return Peers(node=node, device=torch.device("cpu"), host="127.0.0.1", timeout_s=timeout_s)


def group(*fences: int) -> MergeGroup:
    """Of nodes 0, 1, ..., which count the same."""
    members = (MergeMember(node=node, fence=fence, share=0.5) for node, fence in enumerate(fences))
    return MergeGroup(name="m", members=tuple(members))


def mean_of(members: list[Peers], group: MergeGroup, address: str) -> list[float]:
    """What each has when node n brings n."""

    def mean(node: int) -> float:
        flat = torch.full((3,), float(node))
        members[node].mean_(flat, group, address)
        return flat[0].item()

    with ThreadPoolExecutor(len(members)) as threads:
        return list(threads.map(mean, range(len(members))))


@pytest.fixture
def pair() -> Iterator[list[Peers]]:
    members = [peers(0), peers(1)]
    yield members
    for member in members:
        member.close()


def test_a_group_is_used_again_without_meeting(pair: list[Peers]) -> None:
    address = pair[0].rendezvous()
    assert pair[0].rendezvous() == address
    assert mean_of(pair, group(1, 2), address) == [0.5, 0.5]
    assert mean_of(pair, group(1, 2), "127.0.0.1:1") == [0.5, 0.5]


def test_a_member_of_a_new_fence_makes_it_a_new_group(pair: list[Peers]) -> None:
    address = pair[0].rendezvous()
    mean_of(pair, group(1, 2), address)
    pair[1] = peers(1)  # as after a restart
    assert mean_of(pair, group(1, 3), address) == [0.5, 0.5]


def test_after_a_member_did_not_come_another_group_can_meet(pair: list[Peers]) -> None:
    alone = peers(0, timeout_s=0.3)
    address = alone.rendezvous()
    with pytest.raises(PeerLostError, match=r"\[1\] did not come"):
        alone.mean_(torch.zeros(3), group(1, 2), address)
    assert mean_of(pair, group(3, 4), address) == [0.5, 0.5]
