"""Asks the trainer what a guard thinks of the versions that jobs make, until the jobs have ended."""

import logging
import math
from collections.abc import Mapping
from typing import NamedTuple

from services.gateway.jobs.book import JobBook
from services.gateway.jobs.happenings import Failed
from services.gateway.jobs.verdicts import awaited, no_verdict
from shared.bus.base import Bus
from shared.clock import Clock
from shared.errors import BusError
from shared.messages.weights import WeightsRequest, WeightsStatus
from shared.subjects import NODE_WEIGHTS

ASK_EVERY_S = 5.0
"""How often to ask while jobs run: each node's answer has the last eight verdicts."""
ASK_OFTEN_S = 0.5
"""The least time between two questions while a job waits for nothing else. The runner looks once a second,
and whenever something has happened.
"""
ASK_TIMEOUT_S = 2.0
VERDICT_DEADLINE_S = 1800.0
"""The longest wait of a job for its verdict, while the trainer answers and the nodes rest: two evaluations
and a minute between them. While a node trains, the guard may have had no occasion.
"""

log = logging.getLogger(__name__)


class _Wait(NamedTuple):
    """A job waits for these nodes, whose versions have not changed since."""

    nodes: Mapping[int, int | None]
    """As `awaited` tells them."""
    since_s: float


class VerdictWatch:
    """Answers cannot be lost, as events can: a verdict is learnt also after a restart."""

    def __init__(self, book: JobBook, *, bus: Bus, clock: Clock) -> None:
        self._book = book
        self._bus = bus
        self._clock = clock
        self._asked_at_s = -math.inf
        self._waits: dict[str, _Wait] = {}
        """By job that waits for its verdict."""

    async def look(self) -> None:
        """Ask if it is time, and have the jobs take in the answer."""
        running = [job for job in self._book if job.status == "running" and job.num_applied]
        every_s = ASK_OFTEN_S if any(job.awaits_verdict for job in running) else ASK_EVERY_S
        if not running or self._clock.now_s() - self._asked_at_s < every_s:
            return
        self._asked_at_s = self._clock.now_s()
        try:
            status = await self._bus.request(NODE_WEIGHTS.at(), WeightsRequest(), timeout_s=ASK_TIMEOUT_S)
        except BusError as error:
            log.info("the trainer does not tell its verdicts: %s", error)
            self._waits.clear()
            return
        self._take(status)

    def _take(self, status: WeightsStatus) -> None:
        now_s = self._clock.now_s()
        before, self._waits = self._waits, {}
        for known in self._book:
            job = self._book.judge(known.id, status)
            if not job.awaits_verdict:
                continue
            wait = _Wait(awaited(job, status), now_s)
            if job.id in before and before[job.id].nodes == wait.nodes:
                wait = before[job.id]
            if now_s - wait.since_s > VERDICT_DEADLINE_S:
                self._book.happen(job.id, Failed(no_verdict(wait.nodes, VERDICT_DEADLINE_S)))
            else:
                self._waits[job.id] = wait
