"""A cluster of idle nodes with stages of known cost, for tests of policies."""

from dataclasses import dataclass, replace

from msgspec import structs

from services.scheduler.costs import Costs
from services.scheduler.events import HeartbeatSeen, PlacedTask, StageProgressed, TaskArrived, TaskAssigned
from services.scheduler.objectives import MeanPrompt, Objectives
from services.scheduler.policies.base import Arrival, Decision, Place, Policy, Task
from services.scheduler.state import ClusterState
from services.scheduler.tasks import shape_of
from shared.messages.cluster import TaskKind
from shared.messages.events import OpKind, OpStarted, StageOp, StageProgress
from shared.messages.inference import InferenceTask, Sampling
from shared.messages.training import TrainingTask
from shared.profiles.times import Work
from shared.settings import MAX_ITERATION_TOKENS
from tests.support.cluster import heartbeat

SLO_S = 1.0
OBJECTIVES = Objectives(ttft_s=SLO_S, when_late="serve_last")


@dataclass(eq=False)
class LinearCosts:
    """A millisecond per token forward, two backward; no hops. Implements `Costs`."""

    num_stages: int | None = 2
    hop_s: float = 0.0
    forward_s_per_token: float = 0.001
    applied_s: float = 0.0
    max_iteration_tokens: int = MAX_ITERATION_TOKENS

    def iteration_s(self, stage: int, work: Work) -> float:
        return self.forward_s_per_token * work.num_tokens

    def forward_s(self, stage: int, work: Work) -> float:
        is_last = self.num_stages is not None and stage == self.num_stages - 1
        return self.iteration_s(stage, work) * (3 if is_last else 1)

    def backward_s(self, stage: int, work: Work) -> float:
        is_last = self.num_stages is not None and stage == self.num_stages - 1
        return 0.0 if is_last else 2 * self.iteration_s(stage, work)

    def step_s(self, stage: int) -> float:
        return self.applied_s

    def is_settled(self, stage: int, kind: OpKind) -> bool:
        return True

    def observe(self, stage: int, kind: OpKind, work: Work, elapsed_s: float) -> None:
        pass


def cluster(
    *nodes: int,
    unready: tuple[int, ...] = (),
    num_stages: int = 2,
    kv_blocks: int = 1024,
    costs: Costs | None = None,
    objectives: Objectives = OBJECTIVES,
    mean_prompt: MeanPrompt | None = None,
) -> ClusterState:
    """All alike and idle."""
    state = ClusterState(
        costs=costs or LinearCosts(num_stages), objectives=objectives, mean_prompt=mean_prompt
    )
    for node in (*nodes, *unready):
        for stage in range(num_stages):
            beat = heartbeat(node, stage, num_stages=num_stages, ready=node in nodes)
            beat = structs.replace(beat, kv_blocks_total=kv_blocks, kv_block_size=16)
            state.apply(HeartbeatSeen(beat, 0.0))
    return state


def request(
    task_id: str, prompt_tokens: int, *, max_tokens: int = 1, timeout_s: float = 60.0
) -> InferenceTask:
    return InferenceTask(
        task_id=task_id,
        gateway="g",
        prompt=(1,) * prompt_tokens,
        sampling=Sampling(max_tokens=max_tokens),
        timeout_s=timeout_s,
    )


def batch(task_id: str, *microbatch_tokens: int) -> TrainingTask:
    return TrainingTask(task_id=task_id, microbatch_tokens=microbatch_tokens)


def kind_of(task: Task) -> TaskKind:
    return "training" if isinstance(task, TrainingTask) else "inference"


def ask(
    state: ClusterState, policy: Policy, task: Task, now_s: float, *, arrived_s: float | None = None
) -> Decision:
    """The policy's decision on a task that is here since `arrived_s` (default: now)."""
    return policy.choose(state, Arrival(task, now_s if arrived_s is None else arrived_s), now_s)


def submit(state: ClusterState, policy: Policy, task: Task, now_s: float) -> Decision:
    """Let a task arrive, and run where the policy says."""
    state.apply(TaskArrived(task.task_id, kind_of(task), shape_of(task), now_s))
    decision = ask(state, policy, task, now_s)
    if isinstance(decision, Place):
        assign(state, task, decision, now_s)
    return decision


def assign(state: ClusterState, task: Task, place: Place, now_s: float) -> None:
    placed = PlacedTask(
        task_id=task.task_id,
        kind=kind_of(task),
        node=place.node,
        shape=replace(shape_of(task), cached_tokens=place.cached_tokens),
        beginnings=place.beginnings,
        arrived_s=now_s,
        forecast=place.forecast,
    )
    state.apply(TaskAssigned(placed, now_s))


def start_forward(
    state: ClusterState, task: TrainingTask, now_s: float, *, node: int, stage: int = 0
) -> None:
    """A stage has just begun with a batch's first microbatch."""
    op = StageOp(
        kind="forward",
        task_ids=(task.task_id,),
        index=0,
        num_tokens=task.microbatch_tokens[0],
        num_pairs=0,
        num_sequences=1,
        num_context_tokens=0,
    )
    running = OpStarted(op=op, ago_s=0.0)
    state.apply(StageProgressed(StageProgress(node=node, stage=stage, ended=(), running=running), now_s))
