"""Events that change the scheduler's state, and the tasks that one may cost. Pure."""

from dataclasses import dataclass

from services.scheduler.costs import Costs
from services.scheduler.forecast import Forecast
from services.scheduler.tasks import NO_SHAPE, TaskShape
from shared.messages.cluster import Heartbeat, StageStopped, TaskKind
from shared.messages.events import StageProgress


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
class RequestsLate:
    """A request cannot be in time: it was refused, or stands in line."""

    now_s: float


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
    | RequestsLate
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
