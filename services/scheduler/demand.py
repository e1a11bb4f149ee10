"""The tasks that come: how many, how long and how urgent. Pure."""

from services.scheduler.events import TaskArrived
from services.scheduler.statistics import RATE_WINDOW_S, ArrivalRate, RunningMoments

MAX_PRIORITIES = 16
"""Priorities of which it is known when they came last."""


class Demand:
    """Every task counts once, when it first asks for a node."""

    def __init__(self) -> None:
        self.inference_rate = ArrivalRate()
        self.training_rate = ArrivalRate()
        self.inference_lengths = RunningMoments()
        """Prompts of all inference tasks that have arrived, in tokens."""
        self._seen_priorities: dict[int, float] = {}
        """When a request of each priority came last."""

    def arrive(self, arrived: TaskArrived) -> None:
        """Note a task that has come."""
        if arrived.kind == "training":
            self.training_rate.add(arrived.now_s)
            return
        self.inference_rate.add(arrived.now_s)
        self.inference_lengths.add(arrived.shape.num_tokens)
        self._seen_priorities[arrived.priority] = arrived.now_s
        if len(self._seen_priorities) > MAX_PRIORITIES:
            del self._seen_priorities[min(self._seen_priorities, key=self._seen_priorities.__getitem__)]

    def outranks(self, priority: int, now_s: float) -> bool:
        """Whether requests that are more urgent have come lately."""
        seen = self._seen_priorities.items()
        return any(other < priority and now_s - at_s < RATE_WINDOW_S for other, at_s in seen)
