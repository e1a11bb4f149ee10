"""Where a stage meets the same stage of other nodes, and the group that they form."""

from threading import Lock

import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from shared.errors import CarrierError
from shared.messages.weights import MergeGroup
from shared.tensors.collective import CollectiveGroup
from shared.tensors.rendezvous import host_store, join_store, store_address


class Peers:
    """All methods block; `mean_` belongs to one background thread.

    A group is kept while its members are the same and none has a new fence: a stage that was restarted
    or has lost touch is restored, and that begins one on every node.
    """

    def __init__(self, *, node: int, device: torch.device, host: str, timeout_s: float) -> None:
        self._node = node
        self._device = device
        self._host = host
        self._timeout_s = timeout_s
        self._store: TCPStore | None = None
        self._making_store = Lock()
        self._group: CollectiveGroup | None = None
        self._met: tuple[tuple[int, int], ...] = ()
        """Node and fence of each of the group's members."""

    def rendezvous(self) -> str:
        """Address of a store in this process. Raises CarrierError if it cannot be served."""
        with self._making_store:
            if self._store is None:
                self._store = host_store(self._host, timeout_s=self._timeout_s)
            return store_address(self._store)

    def mean_(self, flat: Tensor, group: MergeGroup, rendezvous: str) -> None:
        """Replace `flat` by the members' mean, each with its share; they meet at the address `rendezvous`.

        Raises PeerLostError when one is gone, silent or does not come; CarrierError when they do not fit.
        """
        share = next(member.share for member in group.members if member.node == self._node)
        try:
            self._meet(group, rendezvous).mean_(flat, share)
        except CarrierError:
            self.close()
            raise

    def close(self) -> None:
        """Leave the group."""
        if self._group is not None:
            self._group.close()
        self._group, self._met = None, ()

    def _meet(self, group: MergeGroup, rendezvous: str) -> CollectiveGroup:
        members = tuple((member.node, member.fence) for member in group.members)
        if self._group is None or members != self._met:
            self.close()
            self._group = CollectiveGroup(
                join_store(rendezvous, timeout_s=self._timeout_s),
                "-".join(f"{node}.{fence}" for node, fence in members),
                member=self._node,
                members=[node for node, _ in members],
                device=self._device,
                timeout_s=self._timeout_s,
                host=self._host,
            )
            self._met = members
        return self._group
