"""What the scheduler knows of nodes and tasks; pure, and changed by `apply` alone."""

import heapq
from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import assert_never

from shared.messages.cluster import Heartbeat, NodeStatus, StageStopped, TaskKind
from shared.subjects import HEARTBEAT_S

LOST_AFTER_S = 3 * HEARTBEAT_S
"""A stage that was silent for this long is lost, and its node with it."""
OVERDUE_SLACK_S = 5.0
"""How long after a task's own deadline its node still counts it, should nobody report its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedTask:
    """A task that occupies a node."""

    task_id: str
    kind: TaskKind
    node: int
    gateway: str = ""
    """Who waits for an inference task's answer."""
    traceparent: str = ""
    """Context of the span that placed it."""
    overdue_s: float | None = None
    """When (clock of the events) it leaves the state unasked; None: never."""


@dataclass(frozen=True, slots=True)
class HeartbeatSeen:
    heartbeat: Heartbeat
    now_s: float


@dataclass(frozen=True, slots=True)
class StageLeft:
    stopped: StageStopped


@dataclass(frozen=True, slots=True)
class TimePassed:
    now_s: float


@dataclass(frozen=True, slots=True)
class TaskAssigned:
    task: PlacedTask


@dataclass(frozen=True, slots=True)
class TasksEnded:
    task_ids: tuple[str, ...]


Event = HeartbeatSeen | StageLeft | TimePassed | TaskAssigned | TasksEnded


@dataclass(frozen=True, slots=True)
class LostTask:
    """An inference task whose node can no longer finish it: its gateway must hear of it."""

    task: PlacedTask
    reason: str


@dataclass(slots=True)
class _Node:
    stages: dict[int, Heartbeat] = field(default_factory=dict)
    """The newest heartbeat of each living stage."""
    tasks: dict[str, PlacedTask] = field(default_factory=dict)

    @property
    def is_ready(self) -> bool:
        stages = self.stages.values()
        is_whole = 0 in self.stages and self.stages[0].whole
        return is_whole and all(beat.ready and beat.num_stages == len(stages) for beat in stages)


class ClusterState:
    """Nodes, their stages and their tasks.

    Every event costs O(log n) but for a node that is lost (O(its tasks)): the same class runs in a
    simulation of a thousand nodes.
    """

    def __init__(self) -> None:
        self.ready_nodes: list[int] = []
        """Ids of the nodes that can take a task now, ascending."""
        self.last_node = -1
        """The node that was chosen last."""
        self._nodes: dict[int, _Node] = {}
        self._tasks: dict[str, PlacedTask] = {}
        self._seen_s: dict[tuple[int, int], float] = {}
        """When each stage (node, stage) was last heard of, the longest silent first."""
        self._overdue: list[tuple[float, str]] = []
        """A heap; it may still name tasks that have ended."""

    def apply(self, event: Event) -> list[LostTask]:
        """Take the event in; the tasks that it cost. The only way this object changes."""
        match event:
            case HeartbeatSeen(heartbeat, now_s):
                return self._heartbeat(heartbeat, now_s)
            case StageLeft(stopped):
                return self._stage_left(stopped)
            case TimePassed(now_s):
                self._drop_overdue(now_s)
                return self._drop_silent(now_s)
            case TaskAssigned(task):
                self._assign(task)
                return []
            case TasksEnded(task_ids):
                for task_id in task_ids:
                    self._end(task_id)
                return []
            case _:
                assert_never(event)

    @property
    def num_nodes(self) -> int:
        """Nodes of which at least one stage lives."""
        return len(self._nodes)

    def num_tasks(self, node: int) -> int:
        """Tasks that occupy the node."""
        return len(self._nodes[node].tasks)

    def placed(self, task_id: str) -> PlacedTask | None:
        """Where the task is, if it is anywhere."""
        return self._tasks.get(task_id)

    def status(self) -> tuple[NodeStatus, ...]:
        """All known nodes, ascending."""
        return tuple(self._status(node) for node in sorted(self._nodes))

    def _status(self, node_id: int) -> NodeStatus:
        node = self._nodes[node_id]
        num_training = sum(task.kind == "training" for task in node.tasks.values())
        return NodeStatus(
            node=node_id,
            ready=self._is_listed_ready(node_id),
            inference_tasks=len(node.tasks) - num_training,
            training_tasks=num_training,
            stages=tuple(node.stages[stage] for stage in sorted(node.stages)),
        )

    def _heartbeat(self, heartbeat: Heartbeat, now_s: float) -> list[LostTask]:
        key = (heartbeat.node, heartbeat.stage)
        self._seen_s.pop(key, None)  # so that it goes to the end
        self._seen_s[key] = now_s
        stages = self._nodes.setdefault(heartbeat.node, _Node()).stages
        before = stages.get(heartbeat.stage)
        stages[heartbeat.stage] = heartbeat
        self._list_readiness(heartbeat.node)
        if before is not None and before.instance != heartbeat.instance:
            return self._lose_tasks(
                heartbeat.node, f"stage {heartbeat.stage} of node {heartbeat.node} restarted"
            )
        return []

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
        """A training task leaves without a word: the trainer watches the nodes itself."""
        tasks = list(self._nodes[node].tasks.values())
        for task in tasks:
            self._end(task.task_id)
        return [LostTask(task, reason) for task in tasks if task.kind == "inference"]

    def _assign(self, task: PlacedTask) -> None:
        self._tasks[task.task_id] = task
        self._nodes[task.node].tasks[task.task_id] = task
        self.last_node = task.node
        if task.overdue_s is not None:
            heapq.heappush(self._overdue, (task.overdue_s, task.task_id))

    def _end(self, task_id: str) -> None:
        task = self._tasks.pop(task_id, None)
        if task is not None:
            del self._nodes[task.node].tasks[task_id]

    def _drop_overdue(self, now_s: float) -> None:
        while self._overdue and self._overdue[0][0] <= now_s:
            overdue_s, task_id = heapq.heappop(self._overdue)
            task = self._tasks.get(task_id)
            if task is not None and task.overdue_s == overdue_s:
                self._end(task_id)

    def _list_readiness(self, node: int) -> None:
        is_ready, is_listed = self._nodes[node].is_ready, self._is_listed_ready(node)
        if is_ready and not is_listed:
            insort(self.ready_nodes, node)
        elif is_listed and not is_ready:
            self.ready_nodes.remove(node)

    def _is_listed_ready(self, node: int) -> bool:
        at = bisect_left(self.ready_nodes, node)
        return at < len(self.ready_nodes) and self.ready_nodes[at] == node
