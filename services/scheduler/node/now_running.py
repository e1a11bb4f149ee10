"""The present work of a node's stages, as far as they have reported it. Pure."""

from services.scheduler.node.known_work import ITERATION, STEP, Batch, Iteration, Running


class NowRunning:
    """Knows the op that runs on each stage; there is at most one."""

    def __init__(self, num_stages: int) -> None:
        self.by_stage: list[Running | None] = [None] * num_stages

    def clear(self) -> None:
        """Forget all running ops."""
        self.by_stage = [None] * len(self.by_stage)

    def passed(self, flow: Iteration | Batch, microbatch: int = 0) -> None:
        """Note that a task has come further than the stage that was said to run it."""
        for stage, running in self._of(flow):
            if running.op.kind != STEP and running.op.microbatch == microbatch:
                self.by_stage[stage] = None

    def orphan(self, flow: Iteration | Batch) -> None:
        """Note that nothing follows from a task's running ops; the stage is busy all the same."""
        for stage, running in self._of(flow):
            self.by_stage[stage] = Running(running.op._replace(flow=None), running.start_s)

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
