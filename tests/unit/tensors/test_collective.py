"""The weighted mean over the members of a group: real gloo, each member in a thread, or a process to kill."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from shared.errors import CarrierError, PeerLostError
from shared.tensors.collective import CollectiveGroup, can_use_nccl
from shared.tensors.flat import FlatTensors
from shared.tensors.rendezvous import host_store, join_store, store_address

CPU = torch.device("cpu")
LONG_S, SHORT_S = 60.0, 0.5
SMALL_BUCKETS = 4 * 250

T = TypeVar("T")


@pytest.fixture
def store() -> TCPStore:
    return host_store("127.0.0.1", timeout_s=LONG_S)


def join(
    store: TCPStore, member: int, members: Sequence[int], name: str = "merge-1", timeout_s: float = LONG_S
) -> CollectiveGroup:
    """As a member in another process would: over TCP."""
    return CollectiveGroup(
        join_store(store_address(store), timeout_s=LONG_S),
        name,
        member=member,
        members=members,
        device=CPU,
        timeout_s=timeout_s,
        bucket_bytes=SMALL_BUCKETS,
    )


def on_each(members: Sequence[int], work: Callable[[int], T]) -> list[T]:
    """Run `work` for all members at once; results in their order."""
    with ThreadPoolExecutor(len(members)) as threads:
        return list(threads.map(work, members))


def values(member: int, shapes: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(member)
    return {str(number): torch.randn(shape, generator=generator) for number, shape in enumerate(shapes)}


def expected(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """In the order of the members, each operation in float32."""
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total = total + tensor * (weight / sum(weights))
    return total


def mean_of_each(
    store: TCPStore, members: Sequence[int], copies: dict[int, Tensor], weights: dict[int, float]
) -> list[Tensor]:
    def merge(member: int) -> Tensor:
        flat = copies[member].clone()
        join(store, member, members).mean_(flat, weights[member])
        return flat

    return on_each(members, merge)


MANY_SMALL = [(1,), (3,), (2, 5), ()] * 40
FEW_LARGE = [(300, 70), (511,)]


@pytest.mark.parametrize("shapes", [MANY_SMALL, FEW_LARGE, [(2,)]], ids=["many small", "few large", "tiny"])
@pytest.mark.parametrize("weights", [{4: 1.0, 0: 1.0}, {4: 3.0, 0: 0.25}, {2: 1.0, 0: 5.0, 1: 0.5}])
def test_all_members_get_the_same_bits(
    store: TCPStore, weights: dict[int, float], shapes: Sequence[Sequence[int]]
) -> None:
    members = list(weights)
    tensors = {member: values(member, shapes) for member in members}

    def merge(member: int) -> dict[str, Tensor]:
        copy = FlatTensors(tensors[member], CPU)
        copy.copy_from(tensors[member])
        join(store, member, members).mean_(copy.flat, weights[member])
        return copy.views

    for merged in on_each(members, merge):
        for name, tensor in merged.items():
            of_all = [tensors[member][name] for member in members]
            assert torch.equal(tensor, expected(of_all, list(weights.values())))


def test_where_an_element_lies_does_not_change_its_bits(store: TCPStore) -> None:
    """As with a tied embedding, which the first and the last stage merge in groups of their own."""
    members = [0, 1, 2]
    tied = {member: values(member, [(500,)])["0"] for member in members}
    shifted = {member: torch.cat([torch.ones(37), copy]) for member, copy in tied.items()}
    weights = {0: 1.0, 1: 2.0, 2: 4.0}
    first, *_ = mean_of_each(store, members, tied, weights)
    last, *_ = mean_of_each(host_store("127.0.0.1", timeout_s=LONG_S), members, shifted, weights)
    assert torch.equal(first, last[37:])


def test_a_group_merges_again_and_says_what_it_sent(store: TCPStore) -> None:
    members, length = [0, 1, 2], 1000

    def merge(member: int) -> tuple[list[float], int]:
        group, flat = join(store, member, members), torch.full((length,), float(member))
        sent_bytes = group.mean_(flat, 1.0)
        flat += member
        assert group.mean_(flat, 1.0) == sent_bytes
        return flat.tolist(), sent_bytes

    results = on_each(members, merge)
    assert all(flat == pytest.approx([2.0] * length) for flat, _ in results)
    # A ring all-reduce's traffic: 2 (M - 1) / M of the size for each member.
    assert sum(sent_bytes for _, sent_bytes in results) == 2 * (3 - 1) * 4 * length


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (["gpu-a", "gpu-b"], True),
        (["gpu-a"], True),
        (["gpu-a", "gpu-b", "gpu-a"], False),
        (["gpu-a", "cpu"], False),
        (["cpu", "cpu"], False),
    ],
)
def test_nccl_is_for_members_with_a_gpu_each(devices: list[str], expected: bool) -> None:
    assert can_use_nccl(devices) == expected


def test_one_member_alone_keeps_what_it_has(store: TCPStore) -> None:
    flat = torch.arange(100.0)
    assert join(store, 5, [5]).mean_(flat, 3.0) == 0
    assert torch.equal(flat, torch.arange(100.0))


def test_a_member_without_weight_only_receives(store: TCPStore) -> None:
    copies = {0: torch.full((100,), torch.nan), 1: torch.arange(100.0)}
    for merged in mean_of_each(store, [0, 1], copies, {0: 0.0, 1: 2.0}):
        assert torch.equal(merged, torch.arange(100.0))


def test_different_lengths_are_refused_on_all_members_before_anything_is_sent(store: TCPStore) -> None:
    def merge(member: int) -> list[float]:
        group, flat = join(store, member, [0, 1]), torch.full((100 + member,), float(member))
        with pytest.raises(CarrierError, match=r"100\.0, 101\.0"):
            group.mean_(flat, 1.0)
        assert set(flat.tolist()) == {float(member)}
        same = flat[:100]
        group.mean_(same, 1.0)
        return same.tolist()

    assert on_each([0, 1], merge) == [[0.5] * 100] * 2


def test_somebody_must_have_weight(store: TCPStore) -> None:
    def merge(member: int) -> None:
        with pytest.raises(CarrierError, match="weight"):
            join(store, member, [0, 1]).mean_(torch.ones(10), 0.0)

    on_each([0, 1], merge)


# Members that are lost


class Doomed(CollectiveGroup):
    """Kills its process in the middle of a mean."""

    num_exchanges = 0

    def _exchange(self, *args: object) -> None:
        self.num_exchanges += 1
        if self.num_exchanges > 6:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._exchange(*args)


def die_in_the_middle(address: str, member: int, members: Sequence[int]) -> None:
    group = Doomed(
        join_store(address, timeout_s=LONG_S),
        "merge-1",
        member=member,
        members=members,
        device=CPU,
        timeout_s=LONG_S,
        bucket_bytes=SMALL_BUCKETS,
    )
    group.mean_(torch.ones(10_000), 1.0)


@pytest.fixture
def doomed(store: TCPStore) -> Iterator[None]:
    """Member 2 of 0, 1, 2."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=die_in_the_middle, args=(store_address(store), 2, [0, 1, 2]))
    process.start()
    yield
    process.join(LONG_S)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.usefixtures("doomed")
def test_a_killed_member_is_an_error_for_the_others_who_can_go_on_without_it(store: TCPStore) -> None:
    def merge(member: int) -> list[float]:
        group, flat = join(store, member, [0, 1, 2]), torch.ones(10_000)
        with pytest.raises(PeerLostError, match="lost touch with one of members"):
            group.mean_(flat, 1.0)
        with pytest.raises(CarrierError, match="closed"):
            group.mean_(flat, 1.0)
        flat = torch.full((10,), float(member))
        join(store, member, [0, 1], name="merge-2").mean_(flat, 1.0)
        return flat.tolist()

    assert on_each([0, 1], merge) == [[0.5] * 10] * 2


def test_a_silent_member_is_an_error_for_the_others(store: TCPStore) -> None:
    groups = on_each([0, 1], lambda member: join(store, member, [0, 1], timeout_s=SHORT_S))
    with pytest.raises(PeerLostError, match="Timed out"):
        groups[0].mean_(torch.ones(10), 1.0)


def test_a_member_that_does_not_come_is_named(store: TCPStore) -> None:
    def merge(member: int) -> None:
        with pytest.raises(PeerLostError, match=r"of members \[3, 7, 5\] \[7\] did not come within 0.5 s"):
            join(store, member, [3, 7, 5], timeout_s=SHORT_S)

    on_each([3, 5], merge)


def test_a_closed_group_is_an_error_for_this_member_and_for_the_others(store: TCPStore) -> None:
    groups = on_each([0, 1], lambda member: join(store, member, [0, 1]))
    groups[0].close()
    with pytest.raises(CarrierError, match="closed"):
        groups[0].mean_(torch.ones(10), 1.0)
    with pytest.raises(PeerLostError):
        groups[1].mean_(torch.ones(10), 1.0)


# Rendezvous


def test_addresses_that_lead_nowhere_are_errors(store: TCPStore) -> None:
    with pytest.raises(CarrierError, match=r"no rendezvous on 203\.0\.113\.1"):
        host_store("203.0.113.1", timeout_s=SHORT_S)
    with pytest.raises(PeerLostError, match=r"no rendezvous at 127\.0\.0\.1:1 within"):
        join_store("127.0.0.1:1", timeout_s=SHORT_S)
    with pytest.raises(CarrierError, match=r"203\.0\.113\.1 is no address of this machine"):
        CollectiveGroup(
            store, "far", member=0, members=[0], device=CPU, timeout_s=SHORT_S, host="203.0.113.1"
        )


def test_a_store_that_is_gone_is_an_error() -> None:
    store = host_store("127.0.0.1", timeout_s=LONG_S)
    client = join_store(store_address(store), timeout_s=LONG_S)
    del store
    with pytest.raises(PeerLostError):
        CollectiveGroup(client, "late", member=0, members=[0, 1], device=CPU, timeout_s=SHORT_S)
