"""A checkpoint as a model's folder of its own: what `transformers` reads, and nothing else."""

import shutil
from pathlib import Path

from shared import checkpoints
from shared.checkpoints import ADAPTER_CONFIG_NAME, ADAPTER_NAME, MANIFEST_NAME, Checkpoint
from shared.errors import ConfigurationError
from shared.model.index import INDEX_NAME
from shared.model_files import CONFIG_FILES, WEIGHT_FILES, resolve


def export_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy the model into `folder`, which appears whole or not at all; an adapter is merged into its base.

    Raises ConfigurationError when `folder` is there and not empty, or the checkpoint is damaged or cannot be
    copied.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigurationError(f"{folder} is there already, and not an empty folder")
    checkpoints.check_digests(checkpoint)
    if not (checkpoint.manifest.adapter or (checkpoint.folder / INDEX_NAME).exists()):
        raise ConfigurationError(f"{checkpoint.folder} holds no whole model")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        if checkpoint.manifest.adapter:
            _write_merged(checkpoint, unfinished)
        for file in _model_files(checkpoint):
            shutil.copyfile(file, unfinished / file.name)
        unfinished.replace(folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise ConfigurationError(f"cannot export {checkpoint.folder} to {folder}: {error}") from error


def _model_files(checkpoint: Checkpoint) -> list[Path]:
    """All but the manifest, what only training needs, and an adapter's own files."""
    others = (MANIFEST_NAME, ADAPTER_NAME, ADAPTER_CONFIG_NAME)
    return [
        file
        for file in sorted(checkpoint.folder.iterdir())
        if file.name not in others and not file.name.startswith(checkpoints.TRAINING_ONLY)
    ]


def _write_merged(checkpoint: Checkpoint, folder: Path) -> None:
    """The model that was adapted, with the adapter in its weights, in float32."""
    # Here: torch takes seconds to load, which exports of whole models need not wait.
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = resolve(checkpoint.manifest.model, CONFIG_FILES + WEIGHT_FILES)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, checkpoint.folder)
    adapted.merge_and_unload().save_pretrained(folder)
