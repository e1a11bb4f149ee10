"""Where nodes of a run that computes meet to share their weights."""

import asyncio

import pytest
import torch

from lemix.simulation.computing import Meetings
from lemix.simulation.loop import run_virtual
from shared.errors import PeerLostError
from tests.support.pair import group


def test_all_members_leave_with_the_mean_by_shares() -> None:
    meetings, of_three = Meetings(), group("m", 0.0, 0.75, 0.25, fences=(1, 1, 1))
    flats = [torch.full((2,), value) for value in (100.0, 4.0, 8.0)]

    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            for node, flat in enumerate(flats):
                tasks.create_task(meetings.mean_("m", node, flat, of_three, timeout_s=10.0))

    run_virtual(main())
    assert [flat.tolist() for flat in flats] == [[5.0, 5.0]] * 3


def test_who_waits_in_vain_is_told_who_came() -> None:
    of_two = group("m", 0.5, 0.5, fences=(1, 1))

    async def main() -> None:
        with pytest.raises(PeerLostError, match=r"only nodes \[1\] have come to m"):
            await Meetings().mean_("m", 1, torch.zeros(2), of_two, timeout_s=10.0)

    run_virtual(main())
