"""The scheduler's knowledge of nodes and tasks; pure, and changed by `apply` alone."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import assert_never

from services.scheduler.accuracy import Accuracy
from services.scheduler.cluster_node import ClusterNode
from services.scheduler.costs import Costs
from services.scheduler.demand import Demand
from services.scheduler.events import (
    Event,
    HeartbeatSeen,
    ListenedUntil,
    LostTask,
    PlacedTask,
    ProfileRead,
    RequestsLate,
    StageLeft,
    StageProgressed,
    TaskArrived,
    TaskAssigned,
    TaskLeftLine,
    TaskQueued,
    TasksEnded,
    TimePassed,
)
from services.scheduler.node.node_model import NodeModel
from services.scheduler.node_costs import NodeCosts
from services.scheduler.objectives import DEFAULT_OBJECTIVES, MeanPrompt, Objectives
from services.scheduler.statistics import ArrivalRate
from services.scheduler.tasks import NO_SHAPE, TaskShape
from services.scheduler.waiting_line import WaitingLine
from shared.messages.cluster import Heartbeat, NodeStatus, StageStopped, TaskKind
from shared.messages.events import StageProgress
from shared.profiles.times import work_of_rows
from shared.schedule import BY_DEFAULT, Feeding
from shared.subjects import HEARTBEAT_S

LOST_AFTER_S = 3 * HEARTBEAT_S
"""A stage that was silent for this long is lost, and its node with it."""
OVERDUE_SLACK_S = 5.0
"""How long after a task's own deadline its node still counts it, should nobody report its end."""
MAX_REMEMBERED = 4096
"""Tasks that have asked for a node and got none, of which the time of their first asking is kept."""


class ClusterState:
    """Nodes, their stages and their tasks.

    Every event costs O(log n) in nodes and tasks, but for a node that is lost (O(its tasks)): the same class
    runs in a simulation of a thousand nodes.
    """

    def __init__(
        self,
        *,
        costs: Costs,
        objectives: Objectives = DEFAULT_OBJECTIVES,
        mean_prompt: MeanPrompt | None = None,
        feeding: Feeding = BY_DEFAULT,
    ) -> None:
        """`mean_prompt`: None: of the mean length so far, with the time that costs say.

        `feeding`: how the trainer feeds batches.
        """
        self.costs = costs
        """The costs that nodes share."""
        self.objectives = objectives
        self._mean_prompt = mean_prompt
        self.demand = Demand()
        self.accuracy = Accuracy()
        self._busy_s = ArrivalRate()
        """Seconds of ops, of all stages together."""
        self.waiting_line = WaitingLine()
        self.last_late_s = float("-inf")
        """When a request last could not be in time."""
        self._costs_of_profile: dict[str, Costs] = {"": costs}
        self._feeding = feeding
        self._arrived_s: dict[str, float] = {}
        """When tasks that have no node yet first asked for one, the oldest first."""
        self.ready_nodes: list[int] = []
        """Ids of the nodes that can take a task now, ascending."""
        self.last_node = -1
        """The node that was chosen last."""
        self.last_node_of: dict[TaskKind, int] = {"inference": -1, "training": -1}
        """The node that was chosen last for a task of each kind."""
        self._nodes: dict[int, ClusterNode] = {}
        self._tasks: dict[str, PlacedTask] = {}
        self._seen_s: dict[tuple[int, int], float] = {}
        """When each stage (node, stage) was last heard of, the longest silent first."""
        self._overdue: list[tuple[float, str]] = []
        """A heap; it may still name tasks that have ended."""

    def apply(self, event: Event) -> list[LostTask]:
        """Take in the event; returns the tasks that it cost. The only way this object changes."""
        match event:
            case ProfileRead(profile, costs):
                self._costs_of_profile[profile] = costs
                return []
            case HeartbeatSeen(heartbeat, now_s):
                return self._heartbeat(heartbeat, now_s)
            case StageLeft(stopped):
                return self._stage_left(stopped)
            case TimePassed(now_s):
                self._drop_overdue(now_s)
                return []
            case ListenedUntil(now_s):
                return self._drop_silent(now_s)
            case TaskArrived():
                self._arrive(event)
                return []
            case TaskQueued(task_id, priority, arrived_s):
                self.waiting_line.join(task_id, priority, arrived_s)
                return []
            case RequestsLate(now_s):
                self.last_late_s = now_s
                return []
            case TaskLeftLine(task_id):
                self.waiting_line.leave(task_id)
                return []
            case TaskAssigned(task, now_s):
                self._assign(task, now_s)
                return []
            case TasksEnded(task_ids, now_s):
                for task_id in task_ids:
                    self._end(task_id, now_s)
                return []
            case StageProgressed(progress, now_s):
                self._progress(progress, now_s)
                return []
            case _:
                assert_never(event)

    @property
    def slo_s(self) -> float:
        """The objective of a prompt of mean length: from its arrival to its first token."""
        return self.ttft_slo_s(self.mean_prompt.num_tokens)

    def ttft_slo_s(self, num_tokens: int) -> float:
        """The run's objective for a prompt of that length: from its arrival to its first token."""
        mean = self.mean_prompt

        def forward_s(num_tokens: int) -> float:
            return mean.forward_s * self._forward_s(num_tokens) / self._forward_s(mean.num_tokens)

        return self.objectives.first_token_s(num_tokens, mean, forward_s)

    def load(self, now_s: float) -> float:
        """Share of their time for which the devices of the ready nodes have lately worked."""
        num_stages = len(self.ready_nodes) * (self.costs.num_stages or 1)
        return min(1.0, self._busy_s.per_s(now_s) / num_stages) if num_stages else 0.0

    @property
    def mean_prompt(self) -> MeanPrompt:
        """A prompt of mean length: as given, or as they came."""
        if self._mean_prompt is not None:
            return self._mean_prompt
        num_tokens = max(1, round(self.demand.inference_lengths.mean))
        return MeanPrompt(num_tokens, self._forward_s(num_tokens))

    def _forward_s(self, num_tokens: int) -> float:
        work = work_of_rows(0, num_tokens)
        return sum(self.costs.iteration_s(stage, work) for stage in range(self.costs.num_stages or 1))

    @property
    def num_nodes(self) -> int:
        """Nodes of which at least one stage lives."""
        return len(self._nodes)

    def node(self, node: int) -> ClusterNode:
        """Everything that is known of a node."""
        return self._nodes[node]

    def placed(self, task_id: str) -> PlacedTask | None:
        """The task's place, if it has one."""
        return self._tasks.get(task_id)

    def shape_of(self, task_id: str) -> TaskShape:
        """The size of a task, as it was placed."""
        task = self._tasks.get(task_id)
        return task.shape if task else NO_SHAPE

    def arrived_s(self, task_id: str) -> float | None:
        """When a task that has no node yet first asked for one."""
        return self._arrived_s.get(task_id)

    def knows_profile(self, profile: str) -> bool:
        """Whether costs of nodes with this profile are known."""
        return profile in self._costs_of_profile

    def holder(self, beginnings: Sequence[int], nodes: Sequence[int]) -> int | None:
        """The node whose KV cache holds most of a prompt; None: none holds anything of it."""
        if not beginnings:
            return None
        held = {node: self._nodes[node].prefixes.num_blocks(beginnings) for node in nodes}
        best = max(nodes, key=held.__getitem__)
        return best if held[best] else None

    def status(self) -> tuple[NodeStatus, ...]:
        """The status of all known nodes, ascending."""
        return tuple(
            self._nodes[node].status(is_ready=self._is_listed_ready(node)) for node in sorted(self._nodes)
        )

    def _heartbeat(self, heartbeat: Heartbeat, now_s: float) -> list[LostTask]:
        key = (heartbeat.node, heartbeat.stage)
        self._seen_s.pop(key, None)  # so that it goes to the end
        self._seen_s[key] = now_s
        node = self._nodes.get(heartbeat.node) or self._add(heartbeat)
        before = node.beat(heartbeat)
        if heartbeat.stage == 0:
            self.costs.max_iteration_tokens = heartbeat.max_iteration_tokens
        if self.costs.num_stages is None:
            self.costs.num_stages = heartbeat.num_stages
        self._list_readiness(heartbeat.node)
        if before is not None and before.instance != heartbeat.instance:
            reason = f"stage {heartbeat.stage} of node {heartbeat.node} restarted"
            return self._lose_tasks(heartbeat.node, reason)
        return []

    def _add(self, heartbeat: Heartbeat) -> ClusterNode:
        shared = self._costs_of_profile.get(heartbeat.profile, self.costs)
        num_stages = self.costs.num_stages or heartbeat.num_stages  # a node of another number is never ready
        others = [other.costs for other in self._nodes.values() if other.costs.shares(shared)]
        costs = NodeCosts(shared, num_stages, others)
        node_model = NodeModel(num_stages, costs, feeding=self._feeding)
        self._nodes[heartbeat.node] = ClusterNode(heartbeat.node, node_model, costs)
        return self._nodes[heartbeat.node]

    def _stage_left(self, stopped: StageStopped) -> list[LostTask]:
        node = self._nodes.get(stopped.node)
        beat = node.stages.get(stopped.stage) if node else None
        if beat is None or beat.instance != stopped.instance:
            return []  # a successor already runs in its place
        return self._lose_stage(stopped.node, stopped.stage, "was stopped")

    def _drop_silent(self, now_s: float) -> list[LostTask]:
        lost: list[LostTask] = []
        while self._seen_s:
            (node, stage), seen_s = next(iter(self._seen_s.items()))
            if now_s - seen_s < LOST_AFTER_S:
                break
            lost += self._lose_stage(node, stage, f"was silent for {LOST_AFTER_S:g} s")
        return lost

    def _lose_stage(self, node: int, stage: int, what: str) -> list[LostTask]:
        del self._seen_s[node, stage]
        del self._nodes[node].stages[stage]
        lost = self._lose_tasks(node, f"stage {stage} of node {node} {what}")
        self._list_readiness(node)
        if not self._nodes[node].stages:
            del self._nodes[node]
        return lost

    def _lose_tasks(self, node: int, reason: str) -> list[LostTask]:
        """End the node's tasks. Training tasks need no message: the trainer watches the nodes itself."""
        tasks = list(self._nodes[node].tasks.values())
        for task in tasks:
            self._leave(task.task_id)
        self._nodes[node].clear()
        return [LostTask(task, reason) for task in tasks if task.kind == "inference"]

    def _arrive(self, arrived: TaskArrived) -> None:
        if arrived.task_id in self._arrived_s or arrived.task_id in self._tasks:
            return  # it asks again
        if len(self._arrived_s) >= MAX_REMEMBERED:
            del self._arrived_s[next(iter(self._arrived_s))]
        self._arrived_s[arrived.task_id] = arrived.now_s - arrived.waited_s
        self.demand.arrive(arrived)

    def _assign(self, task: PlacedTask, now_s: float) -> None:
        self._arrived_s.pop(task.task_id, None)
        self._tasks[task.task_id] = task
        self._nodes[task.node].assign(task, now_s)
        self.last_node = self.last_node_of[task.kind] = task.node
        if task.overdue_s is not None:
            heapq.heappush(self._overdue, (task.overdue_s, task.task_id))

    def _end(self, task_id: str, now_s: float) -> None:
        task = self._leave(task_id)
        if task is not None:
            self._nodes[task.node].node_model.end(task_id, now_s)

    def _leave(self, task_id: str) -> PlacedTask | None:
        task = self._tasks.pop(task_id, None)
        if task is not None:
            self._nodes[task.node].leave(task)
        return task

    def _progress(self, progress: StageProgress, now_s: float) -> None:
        node = self._nodes.get(progress.node)
        if node is None or progress.stage >= node.node_model.num_stages:
            return
        for ended in progress.ended:
            self.accuracy.op_ended(node.costs, progress.stage, ended)
            node.costs.observe(progress.stage, ended.op.kind, ended.op.work, ended.elapsed_s)
            self._busy_s.add(now_s, ended.elapsed_s)
        for task in node.node_model.progressed(progress, now_s):
            self.accuracy.first_token_came(task, self._tasks.get(task.task_id))

    def _drop_overdue(self, now_s: float) -> None:
        while self._overdue and self._overdue[0][0] <= now_s:
            overdue_s, task_id = heapq.heappop(self._overdue)
            task = self._tasks.get(task_id)
            if task is not None and task.overdue_s == overdue_s:
                self._end(task_id, now_s)

    def _list_readiness(self, node: int) -> None:
        is_ready, is_listed = self._nodes[node].is_ready, self._is_listed_ready(node)
        if is_ready and not is_listed:
            insort(self.ready_nodes, node)
        elif is_listed and not is_ready:
            self.ready_nodes.remove(node)

    def _is_listed_ready(self, node: int) -> bool:
        at = bisect_left(self.ready_nodes, node)
        return at < len(self.ready_nodes) and self.ready_nodes[at] == node
