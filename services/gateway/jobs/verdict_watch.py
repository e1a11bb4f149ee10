"""Asks the trainer what a guard thinks of the versions that jobs make, until the jobs have ended."""

import logging
import math

from services.gateway.jobs.book import JobBook
from services.gateway.jobs.job import Failed, JobError
from shared.bus.base import Bus
from shared.clock import Clock
from shared.errors import BusError
from shared.messages.weights import WeightsRequest, WeightsStatus
from shared.subjects import NODE_WEIGHTS

ASK_EVERY_S = 5.0
"""How often to ask while jobs run: each node's answer has the last eight verdicts."""
ASK_OFTEN_S = 0.25
"""The same while a job waits for nothing else."""
ASK_TIMEOUT_S = 2.0
VERDICT_DEADLINE_S = 1800.0
"""The longest wait of a job for its verdict, while the trainer answers: two evaluations and a rest."""

log = logging.getLogger(__name__)


class VerdictWatch:
    """Answers cannot be lost, as events can: a verdict is learnt also after a restart."""

    def __init__(self, book: JobBook, *, bus: Bus, clock: Clock) -> None:
        self._book = book
        self._bus = bus
        self._clock = clock
        self._asked_at_s = -math.inf
        self._waits_since_s: dict[str, float] = {}
        """By job that waits for its verdict: since when, without a break, the trainer has had none for it."""

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
            self._waits_since_s.clear()
            return
        self._take(status)

    def _take(self, status: WeightsStatus) -> None:
        now_s = self._clock.now_s()
        since_s, self._waits_since_s = self._waits_since_s, {}
        for job in self._book:
            if not self._book.judge(job.id, status).awaits_verdict:
                continue
            begin_s = since_s.get(job.id, now_s)
            if now_s - begin_s > VERDICT_DEADLINE_S:
                self._book.happen(job.id, Failed(_not_judged()))
            else:
                self._waits_since_s[job.id] = begin_s


def _not_judged() -> JobError:
    return JobError(
        code="not_judged",
        message=(
            "All steps are durable, but the guard has not judged a version with them within "
            f"{VERDICT_DEADLINE_S:g} s: the trainer's log says why. `lemix status` shows what is served"
        ),
    )
