"""Settings of one stage worker (environment: LEMIX_<NAME>)."""

from pathlib import Path
from tempfile import gettempdir
from typing import Literal, Self

from pydantic import Field

from shared import slices
from shared.schedule import MergeName, StashingName
from shared.settings import MAX_ITERATION_TOKENS, LemixSettings

OF_TRAINING = (
    "dtype",
    "optimizer",
    "optimizer_beta1",
    "optimizer_beta2",
    "optimizer_epsilon",
    "weight_decay",
)
"""Settings that the weights depend on."""

OptimizerName = Literal["adamw", "nadamw"]

_KV_TOKENS = 16384
_SHARED_MEMORY = Path("/dev/shm")


_ON_CPU = 128
"""Rows of an iteration beside which streams wait at most 2.6 times their median (docs/benchmarks)."""


class StageWorkerSettings(LemixSettings):
    """Which stages of which node this process holds, and how much it may hold of anything."""

    node: int = Field(ge=0)
    stage: int = Field(ge=0)
    """The process's first stage, or its only one."""
    stages_held: int = Field(default=1, ge=1)
    """Consecutive stages of the node that the process holds."""
    num_stages: int = Field(ge=1)
    device: str = "cpu"
    """`cpu` or `cuda:N`; several, separated by commas, are dealt out to the process's stages in turn."""
    emulate: str = ""
    """A profile, as `llama2-7b@a100` or a file: take its time and compute nothing. Empty: compute."""
    node_profile: str = ""
    """The profile of this node's devices, as the scheduler can read it; the same for all of its stages.

    Empty: that of `emulate`, else the scheduler's own."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The dtype of weights, activations and KV cache; learning happens in float32 (docs/training.md).

    `auto`: on a GPU that of the model's weights, float32 elsewhere."""
    num_threads: int = Field(default=1, ge=1)
    """Compute threads on the CPU, where all stages of the process take turns."""
    shm_dir: Path = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(gettempdir())
    """Where arenas are made; stages that see the same folder share memory."""

    kv_tokens: int | None = Field(default=None, ge=1)
    """Room in the KV cache, prompts and completions together; None: what fits a GPU's memory, else 16384."""
    memory_share: float = Field(default=0.9, gt=0, le=1)
    """The part of a GPU's memory that its stages may take, all together."""
    stages_on_device: int = Field(default=1, ge=1)
    """Stages that share a device's memory; those of one process are counted."""
    kv_block_size: int = Field(default=16, ge=1)
    max_iteration_tokens: int | None = Field(default=None, ge=1, le=4096)
    """Rows of one iteration: longer prompts are prefilled in pieces. Results of all must fit a message.

    None: 128 on a CPU, 512 elsewhere."""
    max_microbatch_tokens: int = Field(default=2048, ge=2)
    """Rows of one microbatch; the trainer must use the same number."""
    max_waiting: int = Field(default=256, ge=1)
    """Requests in line for the KV cache; more are refused with 429."""

    discipline: str = "slo_first"
    """Order of the stage's local queue: `slo_first` or `fifo`."""
    training_patience_s: float = Field(default=0.5, ge=0)
    """How long training work waits behind inference at most (`slo_first`)."""
    max_queued: int = Field(default=1024, ge=1)
    """Work items in the local queue; more mean that a peer does not keep to the protocol."""

    adapter: Literal["none", "lora"] = "none"
    """The weights that train: all, or a LoRA adapter beside them. The same for all stages of a run."""
    lora_rank: int = Field(default=8, ge=1)
    lora_alpha: int = Field(default=16, ge=1)
    """The adapter's share is multiplied by alpha / rank."""
    lora_targets: str = Field(default="all-linear", pattern=r"^[\w-]+(,[\w-]+)*$")
    """Linear modules that get an adapter, by their names within a layer, or `all-linear`."""

    stashing: StashingName = "full"
    """Old weights kept for microbatches in flight; the trainer must use the same."""
    activation_checkpointing: bool = False
    """Keep only a microbatch's inputs, and run its forward again when its backward comes."""
    optimizer: OptimizerName = "adamw"
    """`adamw`, or one that stands delayed gradients: `nadamw`."""
    optimizer_beta1: float | None = Field(default=None, ge=0, lt=1)
    """Momentum; None: 0.9 of `adamw`, 0.99 of `nadamw`."""
    optimizer_beta2: float = Field(default=0.95, ge=0, lt=1)
    optimizer_epsilon: float = Field(default=1e-8, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)

    merge: MergeName = "none"
    """`outer`: keep the weights of the last merge, too; the trainer must use the same."""
    collective_host: str = "127.0.0.1"
    """This machine's name or address where stages of this node, and the same one of others, reach it."""
    collective_timeout_s: float = Field(default=60.0, gt=0)
    """For each single wait for another node in a merge, or another stage; the same on all."""

    @property
    def process_name(self) -> str:
        last = self.stage + self.stages_held - 1
        return f"stage_worker.{self.node}.{self.stage}" + (f"-{last}" if last > self.stage else "")

    @property
    def of_stages(self) -> list[Self]:
        """Each stage's own settings, as if a process held it alone."""
        devices = self.device.split(",")
        dealt = [devices[place % len(devices)] for place in range(self.stages_held)]
        return [
            self.model_copy(
                update={
                    "stage": self.stage + place,
                    "stages_held": 1,
                    "device": device,
                    "stages_on_device": max(self.stages_on_device, dealt.count(device)),
                }
            )
            for place, device in enumerate(dealt)
        ]

    @property
    def alike_in_merges(self) -> dict[str, str]:
        """Settings that must be the same on all merged nodes: they decide which tensors are averaged."""
        of_adapter = ("lora_rank", "lora_alpha", "lora_targets") if self.adapter == "lora" else ()
        return self.as_text(("optimizer", "adapter", *of_adapter))

    def num_slices(self, num_layers: int) -> int:
        """Parts of a training op on so many layers, between which it may give way to inference."""
        return slices.num_slices(num_layers) if self.discipline == "slo_first" else 1

    @property
    def iteration_tokens(self) -> int:
        """Rows of one iteration at most."""
        computes_on_cpu = self.device == "cpu" and not self.emulate
        return self.max_iteration_tokens or (_ON_CPU if computes_on_cpu else MAX_ITERATION_TOKENS)

    @property
    def num_kv_blocks(self) -> int:
        """Blocks of the KV cache where they do not follow from the device's memory."""
        num_tokens = _KV_TOKENS if self.kv_tokens is None else self.kv_tokens
        return -(-num_tokens // self.kv_block_size)
