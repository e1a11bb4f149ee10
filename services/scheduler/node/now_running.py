"""The present work of a node's stages, as far as they have reported it. Pure."""

from services.scheduler.node.known_work import ITERATION, STEP, Batch, Iteration, Op, Running


class NowRunning:
    """Knows the op that runs on each stage; there is at most one."""

    def __init__(self, num_stages: int) -> None:
        self.by_stage: list[Running | None] = [None] * num_stages
        self.aside: list[Op | None] = [None] * num_stages
        """By stage: what is left of the op that stands aside there."""

    def clear(self) -> None:
        """Forget all running ops."""
        self.by_stage = [None] * len(self.by_stage)
        self.aside = [None] * len(self.aside)

    def passed(self, flow: Iteration | Batch, microbatch: int = 0) -> None:
        """Note that a task has come further than the stage that was said to run it."""
        for stage, running in self._of(flow):
            if running.op.kind != STEP and running.op.microbatch == microbatch:
                self.by_stage[stage] = None
        for stage, op in enumerate(self.aside):
            if op is not None and op.flow is flow and op.kind != STEP and op.microbatch == microbatch:
                self.aside[stage] = None

    def orphan(self, flow: Iteration | Batch) -> None:
        """Note that nothing follows from a task's running ops; the stage is busy all the same."""
        for stage, running in self._of(flow):
            self.by_stage[stage] = running._replace(op=running.op._replace(flow=None))
        self.aside = [
            op if op is None or op.flow is not flow else op._replace(flow=None) for op in self.aside
        ]

    def leaves_by(self, at_s: float) -> bool:
        """Whether the last stage should have finished its iteration by then."""
        last = self.by_stage[-1]
        if last is None or last.op.kind != ITERATION or last.op.flow is None:
            return False
        return last.start_s + last.op.duration_s <= at_s

    def _of(self, flow: Iteration | Batch) -> list[tuple[int, Running]]:
        return [
            (stage, running)
            for stage, running in enumerate(self.by_stage)
            if running is not None and running.op.flow is flow
        ]
