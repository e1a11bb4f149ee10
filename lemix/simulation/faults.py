"""Faults that a message can meet on its way, drawn from a seed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from shared.bus.memory import Carriage


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Shares of all messages, in 0..1. What is late stays in order with what its sender sends later."""

    lost: float = 0.0
    doubled: float = 0.0
    late: float = 0.0
    max_delay_s: float = 0.2
    """A late message is late by anything up to this."""


NO_FAULTS = Faults()


def carriage(faults: Faults, *, hop_s: float, rng: random.Random) -> Carriage | None:
    """How a network with these faults carries messages that usually take `hop_s`; None: all do."""
    if faults == NO_FAULTS:
        return None

    def carry(subject: str) -> Sequence[float]:
        if rng.random() < faults.lost:
            return ()
        delay_s = hop_s + (rng.uniform(0, faults.max_delay_s) if rng.random() < faults.late else 0.0)
        return (delay_s, delay_s) if rng.random() < faults.doubled else (delay_s,)

    return carry
