"""The trainer's lease: which of its fences the stages may believe."""

import asyncio
import logging

from shared.bus.base import Bus, Lease
from shared.errors import BusError, ConfigurationError
from shared.messages.weights import AllowedFences
from shared.subjects import TRAINER_LEASE

FENCES_PER_TERM = 1 << 20
"""A trainer's fences are its term (the revision of its lease) times this, plus one more for each restore."""

log = logging.getLogger(__name__)


class TrainerLease:
    """Leads the nodes until another trainer takes the lease."""

    def __init__(self, bus: Bus, term: int) -> None:
        """`term`: the revision with which this trainer took the lease."""
        self._bus = bus
        self.term = term
        self._turn = asyncio.Lock()
        self.first_fence = term * FENCES_PER_TERM + 1

    @classmethod
    async def take(cls, bus: Bus) -> "TrainerLease":
        """Lead from now on, whoever has until now. Raises BusError."""
        return cls(bus, await bus.next_fence(TRAINER_LEASE))

    def is_later(self, fence: int) -> bool:
        """Whether the fence is above all that this trainer can begin."""
        return fence >= (self.term + 1) * FENCES_PER_TERM

    async def allow(self, fence: int) -> None:
        """Have the stages believe this fence, and those before it in this term.

        Raises BusError when the bucket cannot be written, ConfigurationError when another trainer leads.
        """
        async with self._turn:
            held = await self._held()
            last = max(fence, _allowed(held).last) if held.body else fence
            allowed = AllowedFences(first=self.first_fence, last=last)
            await self._bus.write_lease(TRAINER_LEASE, allowed.pack(), revision=held.revision)

    async def check_claim(self, claim: str) -> None:
        """A stage claims to follow a fence that this trainer has not begun: log it, unless it is right.

        Raises ConfigurationError when another trainer leads.
        """
        try:
            await self._held()
        except BusError as error:
            log.warning("%s, and who leads cannot be read: %s", claim, error)
        else:
            log.warning("%s, and no lease allows it: ignored", claim)

    async def _held(self) -> Lease:
        """The lease, which is this trainer's. Raises BusError or ConfigurationError."""
        lease = await self._bus.read_lease(TRAINER_LEASE)
        if lease is None:
            raise BusError("the trainer's lease is gone")
        is_held = _allowed(lease).first == self.first_fence if lease.body else lease.revision == self.term
        if not is_held:
            raise ConfigurationError(f"another trainer has taken over (revision {lease.revision})")
        return lease


def _allowed(lease: Lease) -> AllowedFences:
    return AllowedFences.unpack(lease.body)
