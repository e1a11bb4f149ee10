"""Files of one stage's share of a checkpoint: weights in Hugging Face names, and files for training only.

The latter hold the optimizer's state, and the random generators' (a model may have dropout).

With an adapter, its weights in peft's names take the place of the model's, and the first stage adds the
file that describes it.
"""

import hashlib
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from services.stage_worker.compute.executor import ShardFiles
from shared.checkpoints import ADAPTER_CONFIG_NAME
from shared.model.partition import LayerRange

if TYPE_CHECKING:
    from peft import LoraConfig

Tensors = dict[str, Tensor]

_RANDOM = "random."


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A copy of a stage's tensors at one version, on the CPU."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    lora: "LoraConfig | None" = None
    """The adapter's config, where the weights are an adapter."""


def take_snapshot(
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    to_host: Callable[[Tensor], Tensor],
    lora: "LoraConfig | None" = None,
) -> Snapshot:
    """Copy tensors that go on changing; `to_host` copies one."""

    def copies(tensors: Mapping[str, Tensor]) -> Tensors:
        return {name: to_host(tensor) for name, tensor in tensors.items()}

    return Snapshot(copies(weights), copies(optimizer), lora)


def write_shard(snapshot: Snapshot, folder: Path, layers: LayerRange) -> ShardFiles:
    """Write and sync the stage's files. Raises OSError when the disk refuses."""
    part = _part(layers)
    weights_name = f"{'adapter_model' if snapshot.lora else 'model'}-{part}"
    contents = {weights_name: snapshot.weights, f"optimizer-{part}": snapshot.optimizer}
    digests = {name: _write(folder / name, tensors) for name, tensors in contents.items()}
    if snapshot.lora and layers.is_first:
        snapshot.lora.save_pretrained(str(folder))
        digests[ADAPTER_CONFIG_NAME] = _sync(folder / ADAPTER_CONFIG_NAME)
    return ShardFiles(
        sha256_by_file=digests,
        file_by_tensor=dict.fromkeys(snapshot.weights, weights_name),
        size_bytes=sum(tensor.numel() * tensor.element_size() for tensor in snapshot.weights.values()),
        written_bytes=sum((folder / name).stat().st_size for name in digests),
        adapter="lora" if snapshot.lora else "",
    )


def _part(layers: LayerRange) -> str:
    return f"{layers.stage + 1:05}-of-{layers.num_stages:05}.safetensors"


def _write(path: Path, tensors: dict[str, Tensor]) -> str:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # how the library tells of a full disk
        raise OSError(f"cannot write {path}: {error}") from error
    return _sync(path)


def _sync(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_optimizer_state(folder: Path, parameters: Collection[str]) -> dict[str, Tensor]:
    """The optimizer state of these parameters in a checkpoint, whichever stages saved it; may be {}."""
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("optimizer-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            own = [key for key in file.keys() if key.partition(".")[2] in parameters]  # noqa: SIM118
            state.update({key: file.get_tensor(key) for key in own})
    return state


def random_state(device: torch.device) -> Tensors:
    """The state of the generators that a stage on `device` draws from, as `random.<generator>`."""
    state = {f"{_RANDOM}cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state[f"{_RANDOM}cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Let the generators go on from there; those that `state` does not name stay as they are."""
    if (of_cpu := state.get(f"{_RANDOM}cpu")) is not None:
        torch.set_rng_state(of_cpu)
    if device.type == "cuda" and (of_cuda := state.get(f"{_RANDOM}cuda")) is not None:
        torch.cuda.set_rng_state(of_cuda, device)


def read_random_state(folder: Path, layers: LayerRange) -> Tensors:
    """The generators' state that this stage saved; {} when the checkpoint is of another number of stages."""
    path = folder / f"optimizer-{_part(layers)}"
    if not path.exists():
        return {}
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys() if key.startswith(_RANDOM)}  # noqa: SIM118
