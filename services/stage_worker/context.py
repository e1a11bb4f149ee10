"""The objects that both halves of a stage worker, serving and training, share."""

import logging
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

log = logging.getLogger(__name__)


class Ignored:
    """Counts the training commands that were refused or ignored because of their fence."""

    def __init__(self) -> None:
        self.num = 0

    def note(self, what: str, reason: str) -> None:
        """Count and log one of them."""
        self.num += 1
        log.info("%s: %s; it changes nothing (%d such so far)", what, reason, self.num)

    def is_other(self, what: str, fence: int, followed: int) -> bool:
        """Whether the command has another fence than the one that is followed; then it is noted."""
        if fence != followed:
            self.note(what, f"fence {fence} is not {followed}, which this stage follows")
        return fence != followed


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
    ignored: Ignored


def is_inside(path: str, folder: Path) -> bool:
    """Whether a path that a message names lies in `folder`, links followed."""
    return Path(path).resolve().is_relative_to(folder.resolve())


def check_in_run(folder: str, checkpoints: Path) -> None:
    """Raises RefusedError: messages must not lead this process to any file there is."""
    if not is_inside(folder, checkpoints):
        raise RefusedError(f"{folder} is not in this run's folder of checkpoints {checkpoints}", code=403)
