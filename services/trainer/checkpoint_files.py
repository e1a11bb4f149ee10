"""The files of checkpoints: a temporary folder that stages write into, made durable by one rename.

All methods block on the disk and raise OSError when it refuses; the durable checkpoints stay as they were.
"""

import json
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Self

from services.trainer import rollback_files
from services.trainer.adapter_file import join_adapter
from services.trainer.settings import TrainFrom
from services.trainer.versions import Ledger, Lineage
from shared import checkpoints
from shared.bus.base import StreamState
from shared.checkpoints import Checkpoint, Manifest
from shared.disk import make_folder, replace_file, sync
from shared.errors import ConfigurationError
from shared.messages.base import Message
from shared.messages.training import AdapterKind, ShardSaved
from shared.messages.weights import SavedWeights
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
"""What `from_pretrained` reads beside the weights; copied where the model has it."""

TRAINED_DTYPE = "float32"
"""What stages hold and save, whatever the model was published in."""

_TEMPORARY = ".saving-"
_START = "start.json"


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What a version has shown on the held-out examples."""

    version: int
    loss: float
    may_serve: bool
    """It serves; else it was withheld."""

    def noted_in(self, manifest: Manifest) -> Manifest:
        """What the version's manifest says then; what was let serve once may serve for good."""
        may_serve = manifest.may_serve or self.may_serve
        return manifest.model_copy(update={"held_out_loss": self.loss, "may_serve": may_serve})


class _Start(Message):
    """Where a run began."""

    stream: str
    """Identity of the training stream."""
    train_from: TrainFrom = "next"
    """The setting; files that do not say it were written under no other."""
    after_sequence: int

    @classmethod
    def at(cls, stream: StreamState, train_from: TrainFrom) -> Self:
        """Of a run that begins now."""
        after = stream.last_sequence if train_from == "next" else stream.first_sequence - 1
        return cls(stream=stream.identity, train_from=train_from, after_sequence=after)


class CheckpointFiles:
    """Writes below `root`, which stages can reach under the same path."""

    def __init__(self, root: Path, *, model_folder: Path, keep: int) -> None:
        self._root = root.resolve()
        self._model_folder = model_folder
        self._keep = keep

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

    def temporary(self, node: int, version: int, epoch: int) -> Path:
        """Where the stages write their shards of `version` in this life of the node."""
        name = f"{_TEMPORARY}{checkpoints.checkpoint_name(version)}-{epoch}"
        return checkpoints.node_folder(self._root, node) / name

    def begin(self, folder: Path) -> None:
        """Make the temporary folder, and remove those of the node's attempts that came to nothing.

        Only now, because until the node was restored a stage may still have been writing there.
        """
        for old in folder.parent.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(old, ignore_errors=True)
        make_folder(folder)

    def finish(self, folder: Path, manifest: Manifest, shards: Iterable[ShardSaved]) -> Checkpoint:
        """Make the stages' shards in `folder` the node's newest durable checkpoint."""
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
        manifest = manifest.model_copy(update={"adapter": adapter, "sha256_by_file": digests})
        checkpoints.write(folder, manifest)
        final = folder.with_name(checkpoints.checkpoint_name(manifest.version))
        if checkpoints.read(final):
            raise FileExistsError(f"{final} is whole already: another trainer has written it")
        if final.exists():
            shutil.rmtree(final)
        folder.rename(final)
        sync(final.parent)
        return Checkpoint(manifest, final)

    def serving(self, of_nodes: Iterable[int]) -> Checkpoint | None:
        """The newest checkpoint of any of these nodes that may serve."""
        found = (checkpoints.checkpoints(self._root, node) for node in of_nodes)
        return checkpoints.serving(chain.from_iterable(found))

    def note_evaluation(self, of_nodes: Iterable[int], evaluated: Evaluated) -> None:
        """In the manifest of that version's checkpoint of these nodes, if there is one."""
        name = checkpoints.checkpoint_name(evaluated.version)
        for folder in (checkpoints.node_folder(self._root, node) / name for node in of_nodes):
            manifest = checkpoints.read(folder)
            if manifest and (noted := evaluated.noted_in(manifest)) != manifest:
                checkpoints.write(folder, noted)

    def prune(self, node: int, undecided: Collection[int] = ()) -> None:
        """Remove all but the newest checkpoints of the node, the newest that may serve, and versions that
        may yet be let serve.
        """
        found = checkpoints.checkpoints(self._root, node)
        for old in dispensable(found, keep=self._keep, undecided=undecided):
            (old.folder / checkpoints.MANIFEST_NAME).unlink()  # first: what is left then is no checkpoint
            sync(old.folder)
            shutil.rmtree(old.folder)

    def oldest_watermark(self) -> int:
        """Up to this stream sequence, no node needs a batch again, whichever checkpoint it goes back to."""
        kept = (
            each
            for node in checkpoints.nodes(self._root)
            for each in checkpoints.checkpoints(self._root, node)
        )
        return min((checkpoint.manifest.watermark for checkpoint in kept), default=0)

    def _as_model(self, folder: Path, shards: Sequence[ShardSaved]) -> None:
        """Add what makes the shards one model."""
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
    """Raises ConfigurationError when the stages did not train the same kind of weights."""
    kinds = {shard.adapter for shard in shards}
    if len(kinds) != 1:
        raise ConfigurationError("the stages of one node have different LEMIX_ADAPTER")
    return kinds.pop()


def _as_adapter(folder: Path, shards: Iterable[ShardSaved], digests: dict[str, str]) -> dict[str, str]:
    """Make the shards one adapter; returns the digests of what is there then."""
    names = sorted({name for shard in shards for name in shard.file_by_tensor.values()})
    others = {name: digest for name, digest in digests.items() if name not in names}
    return others | {checkpoints.ADAPTER_NAME: join_adapter(folder, names)}


def _check_shards(folder: Path, names: Iterable[str]) -> None:
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(f"stages have reported files that {folder} lacks: {', '.join(missing)}")


def dispensable(
    found: Sequence[Checkpoint], *, keep: int, undecided: Collection[int] = ()
) -> list[Checkpoint]:
    """Which of a node's checkpoints, newest first, nothing needs: not the newest `keep`, nor what serves, nor
    versions of which it is `undecided` whether they may.
    """
    serving = checkpoints.serving(found)
    return [
        checkpoint
        for checkpoint in found[keep:]
        if checkpoint is not serving and checkpoint.manifest.version not in undecided
    ]


def served_instead(serving: Checkpoint | None, version: int) -> SavedWeights | None:
    """What serves where stages go on from `version`; None: that itself. `serving`: what may, None: only
    the model as it was before training.
    """
    served = checkpoints.as_saved(serving)
    return None if served.version == version else served


def only_newest(found: Mapping[int, Checkpoint]) -> dict[int, Checkpoint]:
    """What nodes that share their weights go on from.

    Raises ConfigurationError when they did not share them: what only one of them has learnt would be lost.
    """
    apart = sorted(node for node, checkpoint in found.items() if checkpoint.manifest.merge == "none")
    if len(found) > 1 and apart:
        raise ConfigurationError(
            f"nodes {apart} of this run were trained apart and cannot be merged now: go on with "
            "LEMIX_MERGE=none, or choose another --name"
        )
    newest = max(found, key=lambda node: found[node].manifest.version, default=None)
    return {} if newest is None else {newest: found[newest]}


def all_apart(found: dict[int, Checkpoint]) -> dict[int, Checkpoint]:
    """What nodes that train apart go on from: each from its own.

    Raises ConfigurationError when they have shared their weights: one has the checkpoints of all.
    """
    merges = {checkpoint.manifest.merge for checkpoint in found.values()} - {"none"}
    if merges:
        raise ConfigurationError(
            f"the nodes of this run share their weights ({', '.join(sorted(merges))}), and only some have "
            "checkpoints: go on with a LEMIX_MERGE other than none (or schedule=dp), or export the weights "
            "and train them as the model of another --name"
        )
    return found


def ledger_of(found: Iterable[Checkpoint], *, begun_after: int = 0) -> Ledger:
    """What the nodes' newest checkpoints say about batches; a run without any begins after `begun_after`."""
    manifests = [checkpoint.manifest for checkpoint in found]
    return Ledger.restore(
        {manifest.node: lineage_of(manifest) for manifest in manifests},
        skipped={sequence for manifest in manifests for sequence in manifest.rejected},
        watermark=max((manifest.watermark for manifest in manifests), default=begun_after),
        discarded_ids=[batch_id for manifest in manifests for batch_id in manifest.discarded_batch_ids],
    )


def lineage_of(manifest: Manifest) -> Lineage:
    """What a checkpoint's weights contain."""
    return Lineage(
        durable_version=manifest.version,
        sequences=frozenset(manifest.sequences),
        recent_ids=dict.fromkeys(manifest.recent_batch_ids),
    )


def manifest_of(
    ledger: Ledger,
    node: int,
    version: int,
    *,
    num_stages: int,
    model: str,
    stream: str,
    merge: str = "none",
    settings: Mapping[str, str] | None = None,
    may_serve: bool = True,
    wall_s: float,
) -> Manifest:
    """What a checkpoint of the node at `version` will say, files apart."""
    durable = ledger.make_durable(node, version)
    lineage = durable.lineage(node)
    return Manifest(
        node=node,
        version=version,
        num_stages=num_stages,
        model=model,
        stream=stream,
        merge=merge,
        may_serve=may_serve,
        settings=dict(settings or {}),
        watermark=durable.watermark,
        sequences=tuple(sorted(lineage.sequences)),
        rejected=tuple(sorted(durable.skipped)),
        recent_batch_ids=tuple(lineage.recent_ids),
        discarded_batch_ids=tuple(durable.discarded_ids),
        sha256_by_file={},
        created_wall_s=wall_s,
    )


def rolled_back(manifest: Manifest, ledger: Ledger, *, merge: str) -> Manifest:
    """What the checkpoint of `manifest` will say once nodes have gone back to it, and `ledger` with them.

    `merge`: the trainer's setting now, which says whether all nodes have. The version may serve: who asks for
    it knows what it is.
    """
    lineage = ledger.lineage(manifest.node)
    return manifest.model_copy(
        update={
            "merge": merge,
            "watermark": ledger.watermark,
            "sequences": tuple(sorted(lineage.sequences)),
            "rejected": tuple(sorted(ledger.skipped)),
            "discarded_batch_ids": tuple(ledger.discarded_ids),
            "may_serve": True,
        }
    )
