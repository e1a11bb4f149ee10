"""A member of a group that dies. It imports little, so that it comes soon where it runs as a process."""

import os

import torch

from shared.tensors.collective import CollectiveGroup
from shared.tensors.rendezvous import join_store

TIMEOUT_S = 60.0


def join_and_die(address: str, name: str) -> None:
    """Get as far as the group of two, and no further."""
    CollectiveGroup(
        join_store(address, timeout_s=TIMEOUT_S),
        name,
        member=1,
        members=(0, 1),
        device=torch.device("cpu"),
        timeout_s=TIMEOUT_S,
    )
    os._exit(1)
