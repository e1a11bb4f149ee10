"""The time between tokens on a node, and what an objective for it leaves to others there. Pure."""

from services.scheduler.costs import Costs
from services.scheduler.node.iteration_queue import IterationQueue
from services.scheduler.node.known_work import durations_of
from services.scheduler.node.node_tasks import NodeTasks
from services.scheduler.statistics import RunningMoments
from shared.messages.inference import Pace
from shared.profiles.times import NO_WORK, Work, work_of_rows
from shared.slices import TRAINING_TURN

MIN_ROWS = 16
"""A prompt goes on by so many rows in each iteration, whatever the objective for the time between tokens."""


class TokenTimes:
    """How fast tokens come once all requests of the node decode, and one more."""

    def __init__(
        self,
        num_stages: int,
        costs: Costs,
        tasks: NodeTasks,
        iterations: IterationQueue,
        lengths: RunningMoments,
    ) -> None:
        """`lengths`: of all tasks that the node has had, in tokens."""
        self.slices_s = [0.0] * num_stages
        """By stage: the longest slice of the last batch."""
        self._num_stages = num_stages
        self._costs = costs
        self._tasks = tasks
        self._iterations = iterations
        self._lengths = lengths

    @property
    def tbt_s(self) -> float:
        """Time between two tokens without training."""
        return self._tbt_with(NO_WORK)

    @property
    def full_iteration_s(self) -> float:
        """Time of the slowest stage for an iteration with the decodes here and as many rows as it takes."""
        work = self._iterations.decode_share() + work_of_rows(0, self._costs.max_iteration_tokens)
        return max(durations_of(work, self._costs, self._num_stages))

    def keeps(self, tbt_s: float) -> bool:
        """Whether the tokens of one more request can still come `tbt_s` after each other, beside training."""
        return self.tbt_s + sum(self.slices_s) <= tbt_s

    def pace(self, tbt_s: float) -> Pace:
        """The room that a request leaves to others, for which tokens are to come `tbt_s` after each other."""
        rest_s = tbt_s - sum(self.slices_s)
        turn = min(TRAINING_TURN, max(0.0, rest_s / self.tbt_s - 1))
        return Pace(rows_beside_decodes=self._rows_beside_decodes(rest_s), training_turn=turn)

    def _rows_beside_decodes(self, tbt_s: float) -> int:
        """Most rows of a prompt beside decodes with which tokens still come in time."""
        few, many = MIN_ROWS, self._costs.max_iteration_tokens
        while few < many:
            middle = (few + many + 1) // 2
            fits = self._tbt_with(work_of_rows(round(self._lengths.mean), middle)) <= tbt_s
            few, many = (middle, many) if fits else (few, middle - 1)
        return few

    def _tbt_with(self, more: Work) -> float:
        """Time between two tokens with more rows in each iteration: the way through all stages, or as many
        turns of the slowest stage as there are iterations in flight.
        """
        num_prompts = self._tasks.num_inference - len(self._iterations.decoding)
        rows = [work_of_rows(round(self._lengths.mean), 1)] * (1 + num_prompts // self._num_stages)
        work = sum(rows, self._iterations.decode_share()) + more
        durations_s = durations_of(work, self._costs, self._num_stages)
        way_s = sum(durations_s) + self._num_stages * self._costs.hop_s
        return max(way_s, self._num_stages * max(durations_s))
