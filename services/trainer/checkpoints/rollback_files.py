"""The files of a rollback: an older checkpoint becomes the newest of its node, or of all nodes that share
their weights, wherever the trainer dies.

    1. intend     rollback.json: the older checkpoint's manifest as it will be, which says what is discarded
    2. complete   newer checkpoints are renamed aside, then rollback.json takes the old manifest's place;
                  the newest MAX_ASIDE folders that were renamed stay of each node

What was intended is completed at the next start. All functions block on the disk.
"""

import itertools
import shutil
from pathlib import Path

from shared import checkpoints
from shared.checkpoints import GIVEN_VERSION, Manifest
from shared.disk import make_folder, replace_file, sync
from shared.errors import ConfigurationError

ASIDE = "rolled-back-"
MAX_ASIDE = 6
"""As many as a node keeps otherwise."""
_INTENT = "rollback.json"


def intend(root: Path, manifest: Manifest) -> None:
    """Decide the rollback to the checkpoint of `manifest`, which it will then have.

    Raises OSError when the disk refuses, or the checkpoint is gone; then nothing is decided.
    """
    node_folder = checkpoints.node_folder(root, manifest.node)
    target = node_folder / checkpoints.checkpoint_name(manifest.version)
    if manifest.version == GIVEN_VERSION and not target.exists():
        make_folder(target)  # for the manifest alone
    elif manifest.version != GIVEN_VERSION and checkpoints.read(target) is None:
        raise FileNotFoundError(f"{target} was removed meanwhile")
    intent = node_folder / _INTENT
    try:
        replace_file(intent, manifest.model_dump_json(indent=1) + "\n")
    except OSError:
        intent.unlink(missing_ok=True)
        raise


def complete(root: Path, node: int) -> None:
    """Complete the node's intended rollback, if there is one.

    Raises ConfigurationError when the intention cannot be read, or the disk refuses.
    """
    intent = checkpoints.node_folder(root, node) / _INTENT
    if not intent.exists():
        return
    try:
        _complete(root, Manifest.model_validate_json(intent.read_bytes()), intent)
    except (OSError, ValueError) as error:
        reason = f"the rollback in {intent} is decided and cannot be done: {error}"
        raise ConfigurationError(f"{reason}; it is tried again at the next start") from error


def _complete(root: Path, manifest: Manifest, intent: Path) -> None:
    target = intent.with_name(checkpoints.checkpoint_name(manifest.version))
    for node in checkpoints.nodes_like(root, manifest.node, merge=manifest.merge):
        for newer in checkpoints.newer_folders(root, node, manifest.version):
            newer.rename(_free_name(newer))
        sync(checkpoints.node_folder(root, node))
    intent.replace(target / checkpoints.MANIFEST_NAME)
    sync(target)
    sync(intent.parent)
    for node in checkpoints.nodes_like(root, manifest.node, merge=manifest.merge):
        _remove_oldest(checkpoints.node_folder(root, node))


def _remove_oldest(node_folder: Path) -> None:
    """A folder's ctime says when it was renamed."""
    aside = sorted(node_folder.glob(f"{ASIDE}*"), key=lambda folder: (folder.stat().st_ctime_ns, folder.name))
    for folder in aside[:-MAX_ASIDE]:
        shutil.rmtree(folder, ignore_errors=True)


def complete_all(root: Path) -> None:
    """Complete the rollbacks that an earlier trainer intended. Raises as `complete`."""
    for node in checkpoints.nodes(root):
        complete(root, node)


def _free_name(folder: Path) -> Path:
    """A name that is free: version numbers come again after a rollback, and so may these names."""
    name = folder.with_name(f"{ASIDE}{folder.name}")
    others = (name.with_name(f"{name.name}-{number}") for number in itertools.count(2))
    return next(free for free in itertools.chain([name], others) if not free.exists())
