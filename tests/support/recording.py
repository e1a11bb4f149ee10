"""Executors that note what no message tells: the weights of each forward, and the norms of gradients."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from services.stage_worker.compute.executor import ForwardOutput, GiveWay, Rows, go_on
from services.stage_worker.compute.local_stages import LocalStages
from services.stage_worker.compute.torch_executor import TorchExecutor
from services.stage_worker.settings import StageWorkerSettings
from shared.messages.training import Microbatch
from shared.tensors.ref import TensorRef


@dataclass
class Recorded:
    """The records of all stages of a node."""

    versions: dict[tuple[int, str, int], int] = field(default_factory=dict)
    """(stage, batch, microbatch) -> weights version of its last forward."""
    squared_norms: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    """Batch -> stage -> the squared norm of its gradients."""


class RecordingExecutor(TorchExecutor):
    """Computes as ever."""

    def __init__(
        self, settings: StageWorkerSettings, instance: str, local: LocalStages, recorded: Recorded
    ) -> None:
        super().__init__(settings, instance, local)
        self._stage_number = settings.stage
        self._recorded = recorded

    async def forward(
        self,
        microbatch: Microbatch,
        rows: Rows,
        reference: TensorRef | None = None,
        give_way: GiveWay = go_on,
    ) -> ForwardOutput:
        output = await super().forward(microbatch, rows, reference, give_way)
        self._recorded.versions[self._stage_number, microbatch.batch_id, microbatch.index] = output.version
        return output

    async def measure(self, batch_id: str, tied: TensorRef | None) -> float:
        squared_norm = await super().measure(batch_id, tied)
        self._recorded.squared_norms[batch_id][self._stage_number] = squared_norm
        return squared_norm


def recording_executors(recorded: Recorded) -> Callable[[StageWorkerSettings, str], TorchExecutor]:
    """A maker of the executors of one process."""
    local = LocalStages()
    return lambda settings, instance: RecordingExecutor(settings, instance, local, recorded)
