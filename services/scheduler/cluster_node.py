"""One node of the cluster: its stages, its tasks, its memory and its future. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from services.scheduler.events import PlacedTask
from services.scheduler.node.node_model import NodeModel
from services.scheduler.node_costs import NodeCosts
from services.scheduler.prefix_memory import PrefixMemory
from shared.messages.cluster import Heartbeat, NodeStatus


@dataclass(slots=True)
class ClusterNode:
    """Everything that is known of one node."""

    node: int
    """Its id."""
    node_model: NodeModel
    """Its known work and its future."""
    costs: NodeCosts
    """Its own costs."""
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
    def num_tasks(self) -> int:
        return len(self.tasks)

    @property
    def kv_tokens_free(self) -> int:
        """Room in its KV cache once every task placed there has grown to its full length."""
        return self.kv_capacity - self.kv_tokens

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

    def cached_tokens(self, beginnings: Sequence[int]) -> int:
        """Tokens at the beginning of a prompt that it need not compute."""
        return self.prefixes.num_blocks(beginnings) * self.block_size

    def assign(self, task: PlacedTask, now_s: float) -> None:
        """Take in a task that was placed here."""
        self.tasks[task.task_id] = task
        self.kv_tokens += self._kv_tokens_of(task)
        self.prefixes.add(task.beginnings, self.num_blocks)
        self.node_model.assign(
            task.task_id,
            task.kind,
            task.shape,
            forecast=task.forecast,
            arrived_s=task.arrived_s,
            due_s=task.due_s,
            now_s=now_s,
        )

    def leave(self, task: PlacedTask) -> None:
        """Count a task no longer; its stages may still tell of it."""
        del self.tasks[task.task_id]
        self.kv_tokens -= self._kv_tokens_of(task)

    def clear(self) -> None:
        """Start again with all stages, and without tasks."""
        self.node_model.clear()
        self.prefixes.serves(None)
        self.kv_tokens = 0  # whatever block size stage 0 had

    def beat(self, heartbeat: Heartbeat) -> Heartbeat | None:
        """Take in a stage's heartbeat; returns the one before, None: there was none."""
        before = self.stages.get(heartbeat.stage)
        self.stages[heartbeat.stage] = heartbeat
        self.node_model.put_on_device(heartbeat.stage, heartbeat.first_on_device)
        self.node_model.cut(heartbeat.stage, heartbeat.num_slices)
        if heartbeat.stage == 0:
            self.prefixes.serves(heartbeat.serving_version)
            self.kv_capacity = heartbeat.kv_blocks_total * heartbeat.kv_block_size
            self.costs.max_iteration_tokens = heartbeat.max_iteration_tokens
        return before

    def status(self, *, is_ready: bool) -> NodeStatus:
        num_training = sum(task.kind == "training" for task in self.tasks.values())
        return NodeStatus(
            node=self.node,
            ready=is_ready,
            inference_tasks=self.num_tasks - num_training,
            training_tasks=num_training,
            stages=tuple(self.stages[stage] for stage in sorted(self.stages)),
        )

    def _kv_tokens_of(self, task: PlacedTask) -> int:
        """Most tokens that it may need: the last token is never fed back, and blocks are given whole."""
        if task.kind == "training" or 0 not in self.stages:
            return 0
        tokens = task.shape.prompt_tokens + max(task.shape.max_tokens - 1, 0)
        return -(-tokens // self.block_size) * self.block_size
