"""How well forecasts and promises agree with what happens. Pure."""

from services.scheduler.costs import Costs
from services.scheduler.events import PlacedTask
from services.scheduler.statistics import LateMargin, MeanError
from services.scheduler.tasks import Assigned
from shared.messages.events import OpEnded


class Accuracy:
    """Errors of the cost model and of forecasts, and requests in time, since the start."""

    def __init__(self) -> None:
        self.forward_error = MeanError()
        """Error of the cost model for iterations and training forwards, before it learns from them."""
        self.response_error = MeanError()
        """Error of the forecast at placement: from a request's arrival to its first token."""
        self.num_in_time = self.num_late = 0
        """Requests by when their first token came."""
        self.late_margin = LateMargin()
        """Share of its objective that a request's forecast must leave free."""

    def op_ended(self, costs: Costs, stage: int, ended: OpEnded) -> None:
        """Compare an op's time with what `costs` say of it."""
        op = ended.op
        if op.kind == "iteration":
            self.forward_error.add(costs.iteration_s(stage, op.work), ended.elapsed_s)
        elif op.kind == "forward":
            self.forward_error.add(costs.forward_s(stage, op.work), ended.elapsed_s)

    def first_token_came(self, task: Assigned, placed: PlacedTask | None) -> None:
        """Compare a first token's time with the forecast of it, and with when it was due.

        `placed`: None: the task has ended meanwhile.
        """
        if task.first_token_s is None:
            return
        if task.expected_s is not None:
            self.response_error.add(task.expected_s - task.arrived_s, task.first_token_s - task.arrived_s)
        if task.due_s is not None:
            self.late_margin.add(is_late=task.first_token_s > task.due_s)
        if placed is not None and placed.ttft_s is not None:
            is_late = task.first_token_s - task.arrived_s > placed.ttft_s
            self.num_late += is_late
            self.num_in_time += not is_late
