"""Where durable checkpoints lie and what they contain. Needs no torch.

    <root>/node-0/step-00000016/model-00001-of-00002.safetensors   each stage's weights
                                model.safetensors.index.json       makes them one model
                                optimizer-00001-of-00002.safetensors
                                config.json, tokenizer.json, ...   so that `from_pretrained` reads the folder
                                lemix.json                         the manifest, written last
                  rolled-back-step-00000032/                       a version that was gone back from
                  rollback.json                                    only while that happens
           lineage.jsonl                                           what versions contain: shared/lineage.py

Where an adapter is trained, `adapter_model.safetensors` and `adapter_config.json` stand in the place of the
model's weights, index and config; `peft.PeftModel.from_pretrained` reads them beside the model.

A folder without a readable manifest is no checkpoint: its writer died before it was whole.
"""

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from shared.disk import replace_file
from shared.documents import Document
from shared.errors import ConfigurationError
from shared.messages.training import AdapterKind
from shared.messages.weights import DurableVersion, SavedWeights

MANIFEST_NAME = "lemix.json"
ADAPTER_NAME = "adapter_model.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"
GIVEN_VERSION = 0
"""The model as it was given. Its checkpoint, once nodes have gone back to it, has a manifest and no files."""
TRAINING_ONLY = "optimizer-"
"""Prefix of the files that only training needs."""

_NODE = re.compile(r"node-(\d+)")
_STEP = re.compile(r"step-\d{8,}")

log = logging.getLogger(__name__)


class Manifest(Document):
    """Describes a checkpoint, and which training batches its weights contain."""

    node: int
    version: int
    """Optimizer steps that the weights contain."""
    num_stages: int
    model: str
    """The model that was trained: the setting as it was given."""
    stream: str = ""
    """Identity of the training stream that the sequences are of; empty: not known."""
    merge: str = "none"
    """How the nodes' weights became one: the trainer's setting."""
    watermark: int
    """Stream sequences up to this one are done: in a durable checkpoint of some node, or refused."""
    sequences: tuple[int, ...]
    """Sequences above the watermark whose batches these weights contain."""
    rejected: tuple[int, ...]
    """Sequences above the watermark that no weights will contain: bad batches, duplicates, discarded ones."""
    recent_batch_ids: tuple[str, ...]
    """Ids of the newest batches that these weights contain, oldest first."""
    discarded_batch_ids: tuple[str, ...] = ()
    """Ids of batches that a rollback has taken out of the weights, oldest first."""
    held_out_examples: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    """By batch: the positions of its examples that do not train; of the newest batches that have some."""
    lineage_entry: int | None = None
    """The place of what the lineage file tells of these weights; None: it tells nothing of them."""
    held_out_loss: float | None = None
    """Mean loss per label on held-out examples, in nats; None: not measured."""
    samples_loss: float | None = None
    """On what the model wrote itself before it learnt, per token, in nats; None: not measured."""
    training_loss: float | None = None
    """The loss of the batch whose step made it, before that step, in nats; None: no guard has noted it."""
    is_judged: bool = False
    """A guard has evaluated this version."""
    judged_wall_s: float = 0.0
    """Unix time of its last verdict."""
    why_withheld: str = ""
    """Why the guard did not let it serve: which loss is above which limit."""
    held_out_rise: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """How many times the lowest loss of all versions that had served that was. 1: later ones are compared
    with this one, as it was the best, was not evaluated, or was gone back to.
    """
    may_serve: bool = True
    """False: made under a guard that has not let it serve: it was withheld, or not evaluated (yet)."""
    adapter: AdapterKind = ""
    """The kind of weights in the folder: the whole model, or an adapter to `model`."""
    settings: dict[str, str] = Field(default_factory=dict)
    """Those that the weights depend on, of trainer and stages, by their names."""
    sha256_by_file: dict[str, str]
    """Digests of every file but the manifest; older manifests name only those that stages have written."""
    created_wall_s: float
    """Unix time; 0 of version 0, which is older than any."""

    @property
    def digest(self) -> str:
        """The digest of all files but the manifest, which changes; other weights have another one."""
        return hashlib.sha256(repr(sorted(self.sha256_by_file.items())).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A durable checkpoint."""

    manifest: Manifest
    folder: Path


def as_given(root: Path, node: int, *, model: str = "", stream: str = "") -> Checkpoint:
    """Version 0 of `node`, to which it can always go back: its files are the model's own."""
    manifest = Manifest(
        node=node,
        version=GIVEN_VERSION,
        num_stages=0,
        model=model,
        stream=stream,
        watermark=0,
        sequences=(),
        rejected=(),
        recent_batch_ids=(),
        sha256_by_file={},
        created_wall_s=0.0,
    )
    return Checkpoint(manifest, node_folder(root, node) / checkpoint_name(GIVEN_VERSION))


def as_saved(checkpoint: Checkpoint | None) -> SavedWeights:
    """The weights to load; None: the model as it was before training."""
    if checkpoint is None or checkpoint.manifest.version == GIVEN_VERSION:
        return SavedWeights(version=GIVEN_VERSION, checkpoint="")
    manifest = checkpoint.manifest
    return SavedWeights(version=manifest.version, checkpoint=str(checkpoint.folder), digest=manifest.digest)


def node_folder(root: Path, node: int) -> Path:
    """The folder that holds all checkpoints of `node`."""
    return root / f"node-{node}"


def checkpoint_name(version: int) -> str:
    """The name of a checkpoint's folder: sorts by version."""
    return f"step-{version:08}"


def nodes(root: Path) -> list[int]:
    """Nodes that have a checkpoint folder under `root`."""
    names = (_NODE.fullmatch(path.name) for path in root.glob("node-*"))
    return sorted(int(name[1]) for name in names if name)


def checkpoints(root: Path, node: int) -> list[Checkpoint]:
    """All whole checkpoints of `node`, newest first."""
    folders = _step_folders(root, node)
    found = [Checkpoint(manifest, folder) for folder in folders if (manifest := read(folder))]
    return sorted(found, key=lambda checkpoint: checkpoint.manifest.version, reverse=True)


def _step_folders(root: Path, node: int) -> list[Path]:
    """Newest first, whole or not."""
    found = [path for path in node_folder(root, node).glob("step-*") if _STEP.fullmatch(path.name)]
    return sorted(found, key=_version_of, reverse=True)


def _version_of(step_folder: Path) -> int:
    return int(step_folder.name.removeprefix("step-"))


def newer_folders(root: Path, node: int, version: int) -> list[Path]:
    """Folders of checkpoints of `node` above `version`, whole or not, newest first."""
    return [each for each in _step_folders(root, node) if _version_of(each) > version]


def latest(root: Path, node: int) -> Checkpoint | None:
    """The newest whole checkpoint of `node`."""
    return next(iter(checkpoints(root, node)), None)


def find(root: Path, version: int, node: int | None) -> Checkpoint:
    """The checkpoint of that version.

    Raises ConfigurationError without one, or with several and no `node`: nodes that train apart have
    different ones under the same number.
    """
    every = [each for number in nodes(root) for each in checkpoints(root, number)]
    found = [
        each for each in every if each.manifest.version == version and node in (None, each.manifest.node)
    ]
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(str(each.manifest.node) for each in found)
        raise ConfigurationError(f"nodes {several} each have a version {version}: choose one with --node")
    there = ", ".join(f"{each.manifest.version} (node {each.manifest.node})" for each in every) or "none"
    of_node = "" if node is None else f" of node {node}"
    raise ConfigurationError(f"no durable version {version}{of_node} in {root}; there are: {there}")


def nodes_like(root: Path, node: int, *, merge: str) -> list[int]:
    """Whose checkpoints are this node's, too: of all nodes, where their weights become one."""
    return [node] if merge == "none" else nodes(root)


def serving(found: Iterable[Checkpoint]) -> Checkpoint | None:
    """The newest of these that may serve; None: only the model as it was before training may."""
    return max(filter(_may_serve, found), key=lambda checkpoint: checkpoint.manifest.version, default=None)


def _may_serve(checkpoint: Checkpoint) -> bool:
    return checkpoint.manifest.may_serve


def durable_versions(root: Path, served: Mapping[int, int]) -> list[DurableVersion]:
    """Every whole checkpoint and version 0, by node, newest first; `served` is the version that each node
    serves now.
    """
    every_node = sorted({*nodes(root), *served})
    return [each for node in every_node for each in _described_of(root, node, served.get(node, -1))]


def _described_of(root: Path, node: int, served: int) -> list[DurableVersion]:
    """The node serves its newest one that is not above `served`, and what it has learnt since."""
    manifests = [checkpoint.manifest for checkpoint in checkpoints(root, node)]
    if not manifests or manifests[-1].version != GIVEN_VERSION:
        manifests.append(as_given(root, node).manifest)
    begun_with = next((each for each in manifests if each.version <= served), None)
    return [_described(each, served if each is begun_with else None) for each in manifests]


def _described(manifest: Manifest, served: int | None) -> DurableVersion:
    return DurableVersion(
        node=manifest.node,
        version=manifest.version,
        created_wall_s=manifest.created_wall_s,
        newest_batch_id=manifest.recent_batch_ids[-1] if manifest.recent_batch_ids else "",
        held_out_loss=manifest.held_out_loss,
        samples_loss=manifest.samples_loss,
        may_serve=manifest.may_serve,
        num_ahead=None if served is None else served - manifest.version,
    )


def newest_of(root: Path, node: int, *, model: str) -> Checkpoint | None:
    """The checkpoint that `node` goes on from: its newest, each file checked against the manifest.

    Raises ConfigurationError when it is of another model, or damaged.
    """
    newest = next(_unchecked(root, node), None)
    return newest and _checked(newest, model)


def newest_serving(root: Path, of_nodes: Iterable[int], *, model: str) -> Checkpoint | None:
    """The newest checkpoint of any of these nodes that may serve, checked; None: the model as it was given.

    Raises as `newest_of`.
    """
    of_each = (next(filter(_may_serve, _unchecked(root, node)), None) for node in of_nodes)
    newest = serving(filter(None, of_each))
    if newest is None or newest.manifest.version == GIVEN_VERSION:
        return None
    return _checked(newest, model)


def _unchecked(root: Path, node: int) -> Iterator[Checkpoint]:
    """Newest first. Raises ConfigurationError when one cannot be read that was whole."""
    for folder in _step_folders(root, node):
        if manifest := read(folder):
            yield Checkpoint(manifest, folder)
        elif (folder / MANIFEST_NAME).exists():  # else it was never whole, or was just removed
            raise _damaged(folder, "its manifest cannot be read, or files are missing")


def _checked(checkpoint: Checkpoint, model: str) -> Checkpoint:
    check_model(checkpoint, model)
    check_digests(checkpoint)
    return checkpoint


def _damaged(folder: Path, reason: str) -> ConfigurationError:
    remedy = "put a copy in its place, or choose another --name"
    return ConfigurationError(f"checkpoint {folder} is damaged: {reason}; {remedy}")


def check_model(checkpoint: Checkpoint, model: str) -> None:
    """Raises ConfigurationError when the checkpoint is of another model."""
    trained = checkpoint.manifest.model
    if trained != model and Path(trained).resolve() != Path(model).resolve():
        raise ConfigurationError(
            f"{checkpoint.folder} is a checkpoint of model {trained!r}, not of {model!r}: "
            "choose another --name"
        )


def check_adapter(checkpoint: Checkpoint, adapter: AdapterKind) -> None:
    """Raises ConfigurationError when the checkpoint is not of what this run trains."""
    if checkpoint.manifest.adapter != adapter:
        raise ConfigurationError(
            f"{checkpoint.folder} was made with LEMIX_ADAPTER={checkpoint.manifest.adapter or 'none'}, "
            f"not {adapter or 'none'}: set it to what it was, or choose another --name"
        )


def warn_of_other_settings(checkpoint: Checkpoint, settings: Mapping[str, str]) -> None:
    """Going on with others than the checkpoint was trained with is allowed, and said."""
    then = checkpoint.manifest.settings
    changes = [
        f"{name}={now} (was {then[name]})" for name, now in settings.items() if then.get(name, now) != now
    ]
    if changes:
        log.warning("%s goes on with other settings: %s", checkpoint.folder, ", ".join(changes))


def check_digests(checkpoint: Checkpoint) -> None:
    """Raises ConfigurationError when a file is not what the manifest says."""
    for name, sha256 in checkpoint.manifest.sha256_by_file.items():
        path = checkpoint.folder / name
        try:
            found = sha256_of(path)
        except OSError as error:
            raise ConfigurationError(f"cannot read {path}: {error}") from error
        if found != sha256:
            raise _damaged(checkpoint.folder, f"{name} is not what its manifest says")


def sha256_of(path: Path) -> str:
    """Digest of a file, in hex. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(folder: Path) -> Manifest | None:
    """The manifest of the checkpoint in `folder`; None when the folder is no whole checkpoint."""
    path = folder / MANIFEST_NAME
    if not path.exists():
        return None
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        log.warning("%s is not used: %s", folder, error)
        return None
    missing = [name for name in manifest.sha256_by_file if not (folder / name).exists()]
    if missing:
        log.warning("%s is not used: %s are missing", folder, ", ".join(missing))
        return None
    return manifest


def write(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, whole or not at all, and sync it with the names in `folder`.

    Raises OSError when the disk refuses.
    """
    replace_file(folder / MANIFEST_NAME, manifest.model_dump_json(indent=1) + "\n")
