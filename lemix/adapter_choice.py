"""Whether all weights of a model can learn on the devices of a run, or an adapter has to."""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from lemix.devices import cuda_memory_bytes
from lemix.topology import ClusterOptions
from shared.messages.training import AdapterKind
from shared.training_memory import bytes_in_all

USABLE_SHARE = 0.9
"""A device's share for it: the rest is for keys and values, activations and everything else there."""
_ADAPTER = "LEMIX_ADAPTER"
_GB = 1e9
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_ITEMSIZES = {"float32": 4, "bfloat16": 2}


def with_suitable_adapter(
    options: ClusterOptions,
    inherited: Mapping[str, str],
    num_weights: int | None,
    memory_of: Callable[[str], int | None],
    trained: AdapterKind | None,
) -> tuple[ClusterOptions, str]:
    """Choose LoRA where learning with all weights does not fit; returns the options, and why.

    Empty, with the same options: it fits, is not known, or somebody has chosen. `num_weights`: of the model;
    `memory_of`: bytes of a device; `trained`: what the run's checkpoints hold, which goes on; None: none yet.
    """
    is_chosen = _ADAPTER in inherited or _ADAPTER in options.extra_env
    if is_chosen or options.emulate is not None:
        return options, ""
    if trained is not None:
        return (_with_lora(options), "a LoRA adapter trains, as before") if trained else (options, "")
    if num_weights is None:
        return options, ""
    for device, num_stages in _stages_on(options).items():
        needed = num_weights / options.stages * num_stages * _bytes_of_a_weight(device, options, inherited)
        memory = memory_of(device)
        if memory is not None and needed > USABLE_SHARE * memory:
            why = (
                f"a LoRA adapter trains: all weights, with gradients, moments and kept versions, would take "
                f"about {needed / _GB:.1f} of {memory / _GB:.1f} GB of {device} ({_ADAPTER}=none trains them)"
            )
            return _with_lora(options), why
    return options, ""


def _with_lora(options: ClusterOptions) -> ClusterOptions:
    return replace(options, extra_env={**options.extra_env, _ADAPTER: "lora"})


def memory_bytes(device: str) -> int | None:
    """The memory of `cpu` or `cuda:N`, in bytes; None where it cannot be told."""
    if device != "cpu":
        return cuda_memory_bytes(int(device.partition(":")[2] or 0))
    try:
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
    try:
        return min(physical, int(_CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no control group, or no limit ("max")
        return physical


def _stages_on(options: ClusterOptions) -> Counter[str]:
    num_stages = options.nodes * options.stages
    return Counter(options.devices[place % len(options.devices)] for place in range(num_stages))


def _bytes_of_a_weight(device: str, options: ClusterOptions, inherited: Mapping[str, str]) -> int:
    chosen = {**inherited, **options.extra_env}.get("LEMIX_DTYPE", "auto")
    is_cpu = device == "cpu"
    return bytes_in_all(_ITEMSIZES.get(chosen, 4 if is_cpu else 2), on_cpu=is_cpu)
