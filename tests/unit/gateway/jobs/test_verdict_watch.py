"""How long a job waits for its verdict, by a clock and a trainer that a test plays."""

from types import SimpleNamespace
from typing import Any

import pytest

from services.gateway.jobs.happenings import Happening
from services.gateway.jobs.job import Job
from services.gateway.jobs.transitions import after
from services.gateway.jobs.verdict_watch import VERDICT_DEADLINE_S, VerdictWatch
from services.gateway.jobs.verdicts import after_verdicts
from shared.errors import BusError
from shared.messages.weights import NodeWeights, WeightsStatus
from tests.support.fake_trainer import node_weights
from tests.unit.gateway.jobs.support import NOW_S
from tests.unit.gateway.jobs.test_verdicts import durable_job, served

HALF_S = VERDICT_DEADLINE_S / 2


class Run:
    """One job, of which all is durable on node 0 by version 10; it is the book of the watch, too."""

    def __init__(self, **versions: int) -> None:
        self.job: Job = durable_job(**(versions or {"n0": 10}))
        self.now_s = 0.0
        self.status: WeightsStatus | None = None
        book: Any = self
        self.watch = VerdictWatch(
            book,
            bus=SimpleNamespace(request=self._answer),  # type: ignore[arg-type]
            clock=SimpleNamespace(now_s=lambda: self.now_s),  # type: ignore[arg-type]
        )

    async def _answer(self, *_: object, **__: object) -> WeightsStatus:
        if self.status is None:
            raise BusError("nobody answers")
        return self.status

    def __iter__(self) -> Any:
        return iter([self.job])

    def judge(self, _: str, status: WeightsStatus) -> Job:
        self.job = after_verdicts(self.job, status, NOW_S).job
        return self.job

    def happen(self, _: str, happening: Happening) -> Job:
        self.job = after(self.job, happening, NOW_S).job
        return self.job

    async def look(self, *nodes: NodeWeights, after_s: float, **fields: Any) -> str:
        """Returns the job's status, or the code of its error."""
        self.now_s += after_s
        self.status = WeightsStatus(nodes=nodes, **fields)
        await self.watch.look()
        return self.job.error.code if self.job.error else self.job.status


def waiting(node: int = 0, *, version: int = 10) -> NodeWeights:
    return node_weights(node, version=version, published=4, newest_judged=4)


async def test_a_job_fails_when_its_node_rests_for_long_and_is_not_judged() -> None:
    run = Run()
    for after_s, expected in ((1.0, "running"), (HALF_S, "running"), (HALF_S + 1, "not_judged")):
        assert await run.look(waiting(), after_s=after_s) == expected


async def test_a_job_waits_on_while_its_node_trains() -> None:
    run = Run()
    for version in range(10, 20):
        assert await run.look(waiting(version=version), after_s=VERDICT_DEADLINE_S + 1) == "running"
    assert await run.look(waiting(version=19), after_s=VERDICT_DEADLINE_S + 1) == "not_judged"


async def test_a_job_waits_on_while_the_trainer_is_away() -> None:
    run = Run()
    await run.look(waiting(), after_s=1.0)
    run.status, run.now_s = None, VERDICT_DEADLINE_S
    await run.watch.look()
    assert await run.look(waiting(), after_s=VERDICT_DEADLINE_S) == "running"


@pytest.mark.parametrize(
    ("nodes", "fields"), [((served(1, 7),), {}), ((), {}), ((), {"shares_weights": True})]
)
async def test_a_job_whose_node_is_gone_says_so(nodes: tuple[NodeWeights, ...], fields: Any) -> None:
    run = Run()
    assert await run.look(*nodes, after_s=1.0, **fields) == "running"
    assert await run.look(*nodes, after_s=VERDICT_DEADLINE_S + 1, **fields) == "node_gone"
    error = run.job.error
    assert error is not None and ("no node" in error.message if fields else "0 is not there" in error.message)


async def test_a_node_that_serves_the_job_and_trains_on_does_not_make_it_wait_for_another() -> None:
    run = Run(n0=10, n1=7)
    for version, expected in ((10, "running"), (11, "node_gone")):
        node = node_weights(0, version=version, published=10, newest_judged=10)
        assert await run.look(node, after_s=VERDICT_DEADLINE_S + 1) == expected
