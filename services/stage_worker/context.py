"""The objects that both halves of a stage worker, serving and training, share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.stage_worker.compute.executor import Executor
from services.stage_worker.pipeline.progress import Progress
from services.stage_worker.pipeline.queue import WorkQueue
from services.stage_worker.settings import StageWorkerSettings
from shared.bus.base import Bus
from shared.clock import Clock
from shared.errors import RefusedError
from shared.telemetry import Telemetry


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerContext:
    """The worker's own objects, handed to its halves."""

    settings: StageWorkerSettings
    bus: Bus
    clock: Clock
    telemetry: Telemetry
    executor: Executor[Any, Any]
    queue: WorkQueue
    progress: Progress


def is_inside(path: str, folder: Path) -> bool:
    """Whether a path that a message names lies in `folder`, links followed."""
    return Path(path).resolve().is_relative_to(folder.resolve())


def check_in_run(folder: str, checkpoints: Path) -> None:
    """Raises RefusedError: messages must not lead this process to any file there is."""
    if not is_inside(folder, checkpoints):
        raise RefusedError(f"{folder} is not in this run's folder of checkpoints {checkpoints}", code=403)
