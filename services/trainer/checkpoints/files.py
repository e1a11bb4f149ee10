"""The files of checkpoints: a temporary folder that stages write into, made durable by one rename.

All methods block on the disk and raise OSError when it refuses; the durable checkpoints stay as they were.
"""

import asyncio
import json
import shutil
from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Self

from services.trainer.checkpoints import rollback_files
from services.trainer.checkpoints.adapter_file import join_adapter
from services.trainer.checkpoints.manifests import Verdict
from services.trainer.checkpoints.retention import Retention
from services.trainer.settings import TrainFrom
from shared import checkpoints, lineage
from shared.bus.base import StreamState
from shared.checkpoints import Checkpoint, Manifest
from shared.disk import make_folder, replace_file, sync
from shared.documents import Document
from shared.errors import ConfigurationError
from shared.messages.lineage import LearntBatch
from shared.messages.training import AdapterKind, ShardSaved
from shared.model.index import write_index

CONFIG_FILE = "config.json"
MODEL_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
"""Files that `from_pretrained` reads beside the weights; copied where the model has them."""

TRAINED_DTYPE = "float32"
"""The dtype that stages hold and save, whatever the model was published in."""

_TEMPORARY = ".saving-"
_START = "start.json"


class _Start(Document):
    """Where a run began."""

    stream: str
    """Identity of the training stream."""
    train_from: TrainFrom = "next"
    """The setting; files that do not say it were written under no other."""
    after_sequence: int

    @classmethod
    def at(cls, stream: StreamState, train_from: TrainFrom) -> Self:
        """The start of a run that begins now."""
        after = stream.last_sequence if train_from == "next" else stream.first_sequence - 1
        return cls(stream=stream.identity, train_from=train_from, after_sequence=after)


class CheckpointFiles:
    """Writes below `root`, which stages can reach under the same path."""

    def __init__(self, root: Path, *, model_folder: Path, keep: Retention, merge: str) -> None:
        """`keep`: which of each node; `merge`: how nodes share their weights, "none" if they do not."""
        self._root = root.resolve()
        self._model_folder = model_folder
        self._keep = keep
        self.merge = merge
        self.in_use = asyncio.Lock()
        """Held by whoever removes, renames or annotates durable checkpoints, or reads which there are."""

    @property
    def root(self) -> Path:
        return self._root

    def load(self, *, model: str, stream: str) -> dict[int, Checkpoint]:
        """The newest checkpoint of each node, once a rollback that was begun is done.

        Raises ConfigurationError when one is of another model or another training stream, or damaged.
        """
        rollback_files.complete_all(self._root)
        nodes = checkpoints.nodes(self._root)
        newest = (checkpoints.newest_of(self._root, node, model=model) for node in nodes)
        found = {checkpoint.manifest.node: checkpoint for checkpoint in newest if checkpoint}
        if any(checkpoint.manifest.stream not in ("", stream) for checkpoint in found.values()):
            raise ConfigurationError(
                f"the checkpoints in {self._root} are of another training stream than the one of this NATS "
                f"server: choose another --name, or remove {self._root}"
            )
        return found

    def begun_after(self, stream: StreamState, train_from: TrainFrom, *, has_checkpoints: bool) -> int:
        """The sequence before the run's first. A run that is new begins now, which is written down.

        A restart must not move it: before the first checkpoint it would pass over batches that have come
        since, and learning rates are counted from it. A run that was begun before all were written down is
        counted from the stream's first.
        """
        path = self._root / _START
        known = _Start.model_validate_json(path.read_bytes()) if path.exists() else None
        if has_checkpoints:
            return known.after_sequence if known and known.stream == stream.identity else 0
        if known and (known.stream, known.train_from) == (stream.identity, train_from):
            return known.after_sequence
        begins = _Start.at(stream, train_from)
        if not self._root.exists():
            make_folder(self._root)
        replace_file(path, begins.model_dump_json() + "\n")
        return begins.after_sequence

    def temporary(self, node: int, version: int, fence: int) -> Path:
        """The folder into which the stages write their shards of `version`, in this life of the node."""
        name = f"{_TEMPORARY}{checkpoints.checkpoint_name(version)}-{fence}"
        return checkpoints.node_folder(self._root, node) / name

    def begin(self, folder: Path) -> None:
        """Make the temporary folder, and remove those of the node's failed attempts.

        Not earlier, because until the node was restored a stage may still have been writing there.
        """
        for old in folder.parent.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(old, ignore_errors=True)
        make_folder(folder)

    def finish(
        self,
        folder: Path,
        manifest: Manifest,
        shards: Iterable[ShardSaved],
        learnt: Sequence[LearntBatch] = (),
    ) -> Checkpoint:
        """Make the stages' shards in `folder` the node's newest durable checkpoint.

        `learnt`: the batches that it contains beyond the one before, whose lineage `manifest` still names.
        """
        shards = list(shards)
        digests = {name: digest for shard in shards for name, digest in shard.sha256_by_file.items()}
        _check_shards(folder, digests)
        adapter = _adapter_of(shards)
        if adapter:
            digests = _as_adapter(folder, shards, digests)
        else:
            self._as_model(folder, shards)
        self._copy_model_files(folder)
        digests |= {
            path.name: checkpoints.sha256_of(path) for path in folder.iterdir() if path.name not in digests
        }
        num_before, older = manifest.version - len(learnt), manifest.lineage_entry
        entry = lineage.append(self._root, learnt, num_before=num_before, older=older)
        manifest = manifest.model_copy(
            update={"adapter": adapter, "sha256_by_file": digests, "lineage_entry": entry}
        )
        checkpoints.write(folder, manifest)
        final = folder.with_name(checkpoints.checkpoint_name(manifest.version))
        if checkpoints.read(final):
            raise FileExistsError(f"{final} is whole already: another trainer has written it")
        if final.exists():
            shutil.rmtree(final)
        folder.rename(final)
        sync(final.parent)
        return Checkpoint(manifest, final)

    def serving(self, node: int) -> Checkpoint | None:
        """The newest checkpoint that may serve, of the node or of any that shares its weights."""
        found = (checkpoints.checkpoints(self._root, other) for other in self._nodes_like(node))
        return checkpoints.serving(chain.from_iterable(found))

    def note_verdict(self, node: int, verdict: Verdict) -> None:
        """Write the verdict into the manifests of that version's checkpoints.

        These are the node's, and those of all nodes that share its weights.
        """
        name = checkpoints.checkpoint_name(verdict.version)
        for folder in (checkpoints.node_folder(self._root, other) / name for other in self._nodes_like(node)):
            manifest = checkpoints.read(folder)
            if manifest and (noted := verdict.noted_in(manifest)) != manifest:
                checkpoints.write(folder, noted)

    def verdict_on(self, checkpoint: Checkpoint) -> Verdict | None:
        """The guard's, which it has given since the checkpoint was written, perhaps; None: there is none."""
        manifest = checkpoints.read(checkpoint.folder)
        return Verdict.in_manifest(manifest) if manifest else None

    def prune(self, node: int, *, now_wall_s: float, undecided: Collection[int] = ()) -> None:
        """Remove the node's checkpoints that nothing needs; a guard is `undecided` about some versions."""
        found = checkpoints.checkpoints(self._root, node)
        for old in self._keep.dispensable(found, now_wall_s=now_wall_s, undecided=undecided):
            (old.folder / checkpoints.MANIFEST_NAME).unlink()  # first: what is left then is no checkpoint
            sync(old.folder)
            shutil.rmtree(old.folder)

    def oldest_watermark(self) -> int:
        """The sequence up to which no node needs a batch again.

        Only the newest checkpoints count: going back to an older one discards the batches after it.
        """
        newest = (
            each
            for node in checkpoints.nodes(self._root)
            for each in checkpoints.checkpoints(self._root, node)[: self._keep.newest]
        )
        return min((checkpoint.manifest.watermark for checkpoint in newest), default=0)

    def _nodes_like(self, node: int) -> list[int]:
        return checkpoints.nodes_like(self._root, node, merge=self.merge)

    def _as_model(self, folder: Path, shards: Sequence[ShardSaved]) -> None:
        """Add the files that make the shards one model."""
        file_by_tensor = {name: file for shard in shards for name, file in shard.file_by_tensor.items()}
        sync(write_index(folder, file_by_tensor, sum(shard.size_bytes for shard in shards)))
        config = json.loads((self._model_folder / CONFIG_FILE).read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)  # what older publishers call it
        (folder / CONFIG_FILE).write_text(json.dumps(config | {"dtype": TRAINED_DTYPE}, indent=2) + "\n")
        sync(folder / CONFIG_FILE)

    def _copy_model_files(self, folder: Path) -> None:
        for name in MODEL_FILES:
            if (self._model_folder / name).exists():
                sync(Path(shutil.copyfile(self._model_folder / name, folder / name)))


def _adapter_of(shards: Iterable[ShardSaved]) -> AdapterKind:
    """The kind of adapter of the shards.

    Raises ConfigurationError when the stages did not train the same kind of weights.
    """
    kinds = {shard.adapter for shard in shards}
    if len(kinds) != 1:
        raise ConfigurationError("the stages of one node have different LEMIX_ADAPTER")
    return kinds.pop()


def _as_adapter(folder: Path, shards: Iterable[ShardSaved], digests: dict[str, str]) -> dict[str, str]:
    """Make the shards one adapter; returns the digests of the files that are there then."""
    names = sorted({name for shard in shards for name in shard.file_by_tensor.values()})
    others = {name: digest for name, digest in digests.items() if name not in names}
    return others | {checkpoints.ADAPTER_NAME: join_adapter(folder, names)}


def _check_shards(folder: Path, names: Iterable[str]) -> None:
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(f"stages have reported files that {folder} lacks: {', '.join(missing)}")
