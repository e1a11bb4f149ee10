"""A checkpoint as a model's folder of its own: what `transformers` reads, and nothing else."""

import shutil
from pathlib import Path

from shared import checkpoints
from shared.checkpoints import MANIFEST_NAME, Checkpoint
from shared.errors import ConfigurationError
from shared.model.index import INDEX_NAME


def export_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy the model into `folder`, which appears whole or not at all.

    Raises ConfigurationError when `folder` is there and not empty, or the checkpoint is damaged or cannot be
    copied.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigurationError(f"{folder} is there already, and not an empty folder")
    checkpoints.check_digests(checkpoint)
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for file in _model_files(checkpoint):
            shutil.copyfile(file, unfinished / file.name)
        unfinished.replace(folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise ConfigurationError(f"cannot export {checkpoint.folder} to {folder}: {error}") from error


def _model_files(checkpoint: Checkpoint) -> list[Path]:
    """All but the manifest and what only training needs.

    Raises ConfigurationError when the folder holds no whole model: an adapter has to be merged first.
    """
    if not (checkpoint.folder / INDEX_NAME).exists():
        raise ConfigurationError(f"{checkpoint.folder} holds no whole model")
    return [
        file
        for file in sorted(checkpoint.folder.iterdir())
        if file.name != MANIFEST_NAME and not file.name.startswith(checkpoints.TRAINING_ONLY)
    ]
