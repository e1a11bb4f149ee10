"""The stage's tensors as the model is published, and as checkpoints of the run have them."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from services.stage_worker.settings import StageWorkerSettings
from shared import checkpoints
from shared.checkpoints import Checkpoint
from shared.messages.training import AdapterKind
from shared.model.loader import load_stage, model_partition, read_config
from shared.model.lora import LoraSettings, add_adapter, initial_adapter, read_adapter
from shared.model.stage import Stage
from shared.model_files import CONFIG_FILES, WEIGHT_FILES, resolve


class ModelSource:
    """Reads the disk; all methods block."""

    def __init__(self, settings: StageWorkerSettings) -> None:
        self._settings = settings

    @property
    def base(self) -> Path:
        """The model as it is published."""
        return resolve(self._settings.model, CONFIG_FILES + WEIGHT_FILES)

    @property
    def adapter_kind(self) -> AdapterKind:
        """Empty: all weights train."""
        return "lora" if self._settings.adapter == "lora" else ""

    def serving_checkpoint(self) -> Checkpoint | None:
        """The checkpoint to serve until the trainer restores this stage: most likely served then, too."""
        settings, root = self._settings, self._settings.checkpoint_dir
        of_nodes = checkpoints.nodes_like(root, settings.node, merge=settings.merge)
        return checkpoints.newest_serving(root, of_nodes, model=settings.model)

    def stage(self, durable: Checkpoint | None) -> Stage:
        """Load the stage from that checkpoint, or as it is published."""
        settings, base = self._settings, self.base
        folder = durable.folder if durable and not self.adapter_kind else base
        layers = model_partition(read_config(folder), settings.num_stages)[settings.stage]
        stage = load_stage(folder, layers, device=settings.device)
        if self.adapter_kind:
            add_adapter(stage, self._lora())
        return stage

    def trainable_tensors(self, stage: Stage, checkpoint: Path | None) -> Mapping[str, Tensor]:
        """As they were at the checkpoint, or before any training."""
        if self.adapter_kind:
            return read_adapter(stage, checkpoint) if checkpoint else initial_adapter(stage)
        folder = checkpoint or self.base
        return load_stage(folder, stage.layers, device=self._settings.device).named_tensors()

    def _lora(self) -> LoraSettings:
        settings = self._settings
        targets = tuple(settings.lora_targets.split(","))
        return LoraSettings(rank=settings.lora_rank, alpha=settings.lora_alpha, targets=targets)
