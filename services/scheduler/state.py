"""The scheduler's knowledge of nodes and tasks; pure, and changed by `apply` alone."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import assert_never

from services.scheduler.costs import Costs
from services.scheduler.forecast import Forecast
from services.scheduler.node.node_model import NodeModel
from services.scheduler.node_costs import NodeCosts
from services.scheduler.objectives import DEFAULT_OBJECTIVES, MeanPrompt, Objectives
from services.scheduler.prefix_memory import PrefixMemory
from services.scheduler.statistics import RATE_WINDOW_S, ArrivalRate, LateMargin, MeanError, RunningMoments
from services.scheduler.tasks import NO_SHAPE, Assigned, TaskShape
from services.scheduler.waiting_line import WaitingLine
from shared.messages.cluster import Heartbeat, NodeStatus, StageStopped, TaskKind
from shared.messages.events import OpEnded, StageProgress
from shared.profiles.times import work_of_rows
from shared.schedule import BY_DEFAULT, Feeding
from shared.subjects import HEARTBEAT_S

LOST_AFTER_S = 3 * HEARTBEAT_S
"""A stage that was silent for this long is lost, and its node with it."""
OVERDUE_SLACK_S = 5.0
"""How long after a task's own deadline its node still counts it, should nobody report its end."""
MAX_PRIORITIES = 16
"""Priorities of which it is known when they came last."""
MAX_REMEMBERED = 4096
"""Tasks that have asked for a node and got none, of which the time of their first asking is kept."""


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
    shape: TaskShape = NO_SHAPE
    beginnings: tuple[int, ...] = ()
    """The blocks of its prompt (see `prefix_memory`)."""
    arrived_s: float = 0.0
    """When it first asked for a node."""
    forecast: Forecast | None = None
    """The policy's forecast of the task on that node."""
    due_s: float | None = None
    """When its first token must be through the last stage; None: it is late already, or nobody minds."""
    ttft_s: float | None = None
    """Inference: when its first token is due after its arrival, by its own objective or the run's."""
    tbt_s: float | None = None
    """Inference: the same of the time between its tokens; None: nobody has set one."""
    offload: bool = False
    """Training: with its saved activations in host memory."""


@dataclass(frozen=True, slots=True)
class ProfileRead:
    """These are the costs of nodes that say that they have this profile."""

    profile: str
    costs: Costs


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
class ListenedUntil:
    """All that was said before has been heard: who was not heard for long is lost."""

    now_s: float


@dataclass(frozen=True, slots=True)
class TaskArrived:
    """A task asks for a node. It may come again when it waits, or when its asker was told to ask again."""

    task_id: str
    kind: TaskKind
    shape: TaskShape
    now_s: float
    priority: int = 0
    waited_s: float = 0.0
    """How long it had waited elsewhere before."""


@dataclass(frozen=True, slots=True)
class TaskQueued:
    """A request stands in the waiting line, because it cannot be in time any more."""

    task_id: str
    priority: int
    arrived_s: float


@dataclass(frozen=True, slots=True)
class TaskLeftLine:
    """A request no longer asks for a node, or has one."""

    task_id: str


@dataclass(frozen=True, slots=True)
class TaskAssigned:
    task: PlacedTask
    now_s: float


@dataclass(frozen=True, slots=True)
class TasksEnded:
    task_ids: tuple[str, ...]
    now_s: float


@dataclass(frozen=True, slots=True)
class StageProgressed:
    progress: StageProgress
    now_s: float


Event = (
    ProfileRead
    | HeartbeatSeen
    | StageLeft
    | TimePassed
    | ListenedUntil
    | TaskArrived
    | TaskQueued
    | TaskLeftLine
    | TaskAssigned
    | TasksEnded
    | StageProgressed
)


@dataclass(frozen=True, slots=True)
class LostTask:
    """An inference task whose node can no longer finish it: its gateway must hear of it."""

    task: PlacedTask
    reason: str


@dataclass(slots=True)
class _Node:
    node_model: NodeModel
    costs: NodeCosts
    kv_capacity: int = 0
    """Tokens that its KV cache holds."""
    kv_tokens: int = 0
    """Most tokens that the living inference tasks may need in the KV cache, completions included."""
    stages: dict[int, Heartbeat] = field(default_factory=dict)
    """The newest heartbeat of each living stage."""
    tasks: dict[str, PlacedTask] = field(default_factory=dict)
    prefixes: PrefixMemory = field(default_factory=PrefixMemory)

    @property
    def block_size(self) -> int:
        """Tokens of a block of its KV cache."""
        return self.stages[0].kv_block_size if 0 in self.stages else 1

    @property
    def num_blocks(self) -> int:
        return self.kv_capacity // self.block_size

    @property
    def is_ready(self) -> bool:
        stages = self.stages.values()
        is_whole = 0 in self.stages and self.stages[0].whole
        wanted = self.node_model.num_stages
        is_complete = len(stages) == wanted and all(beat.num_stages == wanted for beat in stages)
        return is_whole and is_complete and all(beat.ready for beat in stages)


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
        self.inference_rate = ArrivalRate()
        self.training_rate = ArrivalRate()
        self._busy_s = ArrivalRate()
        """Seconds of ops, of all stages together."""
        self.inference_lengths = RunningMoments()
        """Prompts of all inference tasks that have arrived, in tokens."""
        self.forward_error = MeanError()
        """Error of the cost model for iterations and training forwards, before it learns from them."""
        self.response_error = MeanError()
        """Error of the forecast at placement: from a request's arrival to its first token."""
        self.num_in_time = self.num_late = 0
        """Requests by when their first token came, since the start."""
        self.late_margin = LateMargin()
        """Share of its objective that a request's forecast must leave free."""
        self.waiting_line = WaitingLine()
        self._costs_of_profile: dict[str, Costs] = {"": costs}
        self._feeding = feeding
        self._seen_priorities: dict[int, float] = {}
        """When a request of each priority came last."""
        self._arrived_s: dict[str, float] = {}
        """When tasks that have no node yet first asked for one, the oldest first."""
        self.ready_nodes: list[int] = []
        """Ids of the nodes that can take a task now, ascending."""
        self.last_node = -1
        """The node that was chosen last."""
        self.last_node_of: dict[TaskKind, int] = {"inference": -1, "training": -1}
        """The node that was chosen last for a task of each kind."""
        self._nodes: dict[int, _Node] = {}
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

    def is_outranked(self, priority: int, now_s: float) -> bool:
        """Whether requests that are more urgent have come lately."""
        seen = self._seen_priorities.items()
        return any(other < priority and now_s - at_s < RATE_WINDOW_S for other, at_s in seen)

    @property
    def mean_prompt(self) -> MeanPrompt:
        """A prompt of mean length: as given, or as they came."""
        if self._mean_prompt is not None:
            return self._mean_prompt
        num_tokens = max(1, round(self.inference_lengths.mean))
        return MeanPrompt(num_tokens, self._forward_s(num_tokens))

    def _forward_s(self, num_tokens: int) -> float:
        work = work_of_rows(0, num_tokens)
        return sum(self.costs.iteration_s(stage, work) for stage in range(self.costs.num_stages or 1))

    @property
    def num_nodes(self) -> int:
        """Nodes of which at least one stage lives."""
        return len(self._nodes)

    def num_tasks(self, node: int) -> int:
        """The number of tasks on the node."""
        return len(self._nodes[node].tasks)

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

    def node_model(self, node: int) -> NodeModel:
        """The node's known work and its future."""
        return self._nodes[node].node_model

    def knows_profile(self, profile: str) -> bool:
        """Whether costs of nodes with this profile are known."""
        return profile in self._costs_of_profile

    def costs_of(self, node: int) -> NodeCosts:
        """The node's own costs."""
        return self._nodes[node].costs

    def kv_tokens(self, node: int) -> int:
        """Tokens that fit the node's whole KV cache, empty or not."""
        return self._nodes[node].kv_capacity

    def kv_tokens_free(self, node: int) -> int:
        """Room in the node's KV cache once every task placed there has grown to its full length."""
        state = self._nodes[node]
        return state.kv_capacity - state.kv_tokens

    def block_size(self, node: int) -> int:
        """Tokens of a block of the node's KV cache."""
        return self._nodes[node].block_size

    def holder(self, beginnings: Sequence[int], nodes: Sequence[int]) -> int | None:
        """The node whose KV cache holds most of a prompt; None: none holds anything of it."""
        if not beginnings:
            return None
        held = {node: self._nodes[node].prefixes.num_blocks(beginnings) for node in nodes}
        best = max(nodes, key=held.__getitem__)
        return best if held[best] else None

    def cached_tokens(self, node: int, beginnings: Sequence[int]) -> int:
        """Tokens at the beginning of a prompt that the node need not compute."""
        state = self._nodes[node]
        return state.prefixes.num_blocks(beginnings) * state.block_size

    def status(self) -> tuple[NodeStatus, ...]:
        """The status of all known nodes, ascending."""
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
        node = self._nodes.get(heartbeat.node) or self._add(heartbeat)
        before = node.stages.get(heartbeat.stage)
        node.stages[heartbeat.stage] = heartbeat
        node.node_model.put_on_device(heartbeat.stage, heartbeat.first_on_device)
        node.node_model.cut(heartbeat.stage, heartbeat.num_slices)
        if heartbeat.stage == 0:
            node.prefixes.serves(heartbeat.serving_version)
            node.kv_capacity = heartbeat.kv_blocks_total * heartbeat.kv_block_size
            self.costs.max_iteration_tokens = heartbeat.max_iteration_tokens
            node.costs.max_iteration_tokens = heartbeat.max_iteration_tokens
        if self.costs.num_stages is None:
            self.costs.num_stages = heartbeat.num_stages
        self._list_readiness(heartbeat.node)
        if before is not None and before.instance != heartbeat.instance:
            reason = f"stage {heartbeat.stage} of node {heartbeat.node} restarted"
            return self._lose_tasks(heartbeat.node, reason)
        return []

    def _add(self, heartbeat: Heartbeat) -> _Node:
        shared = self._costs_of_profile.get(heartbeat.profile, self.costs)
        num_stages = self.costs.num_stages or heartbeat.num_stages  # a node of another number is never ready
        others = [other.costs for other in self._nodes.values() if other.costs.shares(shared)]
        costs = NodeCosts(shared, num_stages, others)
        node_model = NodeModel(num_stages, costs, feeding=self._feeding)
        self._nodes[heartbeat.node] = _Node(node_model, costs)
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
        self._nodes[node].node_model.clear()
        self._nodes[node].prefixes.serves(None)
        self._nodes[node].kv_tokens = 0  # whatever block size stage 0 had
        return [LostTask(task, reason) for task in tasks if task.kind == "inference"]

    def _arrive(self, arrived: TaskArrived) -> None:
        if arrived.task_id in self._arrived_s or arrived.task_id in self._tasks:
            return  # it asks again
        if len(self._arrived_s) >= MAX_REMEMBERED:
            del self._arrived_s[next(iter(self._arrived_s))]
        self._arrived_s[arrived.task_id] = arrived.now_s - arrived.waited_s
        is_training = arrived.kind == "training"
        (self.training_rate if is_training else self.inference_rate).add(arrived.now_s)
        if not is_training:
            self.inference_lengths.add(arrived.shape.num_tokens)
            self._seen_priorities[arrived.priority] = arrived.now_s
            if len(self._seen_priorities) > MAX_PRIORITIES:
                del self._seen_priorities[min(self._seen_priorities, key=self._seen_priorities.__getitem__)]

    def _assign(self, task: PlacedTask, now_s: float) -> None:
        self._arrived_s.pop(task.task_id, None)
        self._tasks[task.task_id] = task
        node = self._nodes[task.node]
        node.tasks[task.task_id] = task
        node.kv_tokens += _kv_tokens(task, node)
        node.prefixes.add(task.beginnings, node.num_blocks)
        node.node_model.assign(
            task.task_id,
            task.kind,
            task.shape,
            forecast=task.forecast,
            arrived_s=task.arrived_s,
            due_s=task.due_s,
            now_s=now_s,
        )
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
            node = self._nodes[task.node]
            del node.tasks[task_id]
            node.kv_tokens -= _kv_tokens(task, node)
        return task

    def _progress(self, progress: StageProgress, now_s: float) -> None:
        node = self._nodes.get(progress.node)
        if node is None or progress.stage >= node.node_model.num_stages:
            return
        for ended in progress.ended:
            self._learn(node.costs, progress.stage, ended)
            self._busy_s.add(now_s, ended.elapsed_s)
        for task in node.node_model.progressed(progress, now_s):
            self._count(task)
            if task.expected_s is not None and task.first_token_s is not None:
                self.response_error.add(task.expected_s - task.arrived_s, task.first_token_s - task.arrived_s)
            if task.due_s is not None and task.first_token_s is not None:
                self.late_margin.add(is_late=task.first_token_s > task.due_s)

    def _count(self, task: Assigned) -> None:
        """Note whether the first token that has come now is in time."""
        placed = self._tasks.get(task.task_id)
        if placed is None or placed.ttft_s is None or task.first_token_s is None:
            return
        is_late = task.first_token_s - task.arrived_s > placed.ttft_s
        self.num_late += is_late
        self.num_in_time += not is_late

    def _learn(self, costs: Costs, stage: int, ended: OpEnded) -> None:
        op = ended.op
        work = op.work
        if op.kind == "iteration":
            self.forward_error.add(costs.iteration_s(stage, work), ended.elapsed_s)
        elif op.kind == "forward":
            self.forward_error.add(costs.forward_s(stage, work), ended.elapsed_s)
        costs.observe(stage, op.kind, work, ended.elapsed_s)

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


def _kv_tokens(task: PlacedTask, node: _Node) -> int:
    """Most tokens that the task may need: the last token is never fed back, and blocks are given whole."""
    if task.kind == "training" or 0 not in node.stages:
        return 0
    tokens = task.shape.prompt_tokens + max(task.shape.max_tokens - 1, 0)
    return -(-tokens // node.block_size) * node.block_size
