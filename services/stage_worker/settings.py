"""Settings of one stage worker (environment: LEMIX_<NAME>)."""

from pathlib import Path
from tempfile import gettempdir

from pydantic import Field

from shared.settings import MAX_ITERATION_TOKENS, LemixSettings

_SHARED_MEMORY = Path("/dev/shm")


class StageWorkerSettings(LemixSettings):
    """Which stage of which node this process is, and how much it may hold."""

    node: int = Field(ge=0)
    stage: int = Field(ge=0)
    num_stages: int = Field(ge=1)
    device: str = "cpu"
    """`cpu` or `cuda:N`."""
    emulate: str = ""
    """A profile, as `llama2-7b@a100` or a file: take its time and compute nothing. Empty: compute."""
    num_threads: int = Field(default=1, ge=1)
    """Compute threads on the CPU; one per worker, unless a worker has cores of its own."""
    shm_dir: Path = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(gettempdir())
    """Where arenas are made; the stages of a node must see the same folder to share memory."""

    kv_tokens: int = Field(default=16384, ge=1)
    """Room in the KV cache, prompts and completions together."""
    kv_block_size: int = Field(default=16, ge=1)
    max_iteration_tokens: int = Field(default=MAX_ITERATION_TOKENS, ge=1, le=4096)
    """Rows of one iteration: longer prompts are prefilled in pieces. Results of all must fit a message."""
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

    adamw_beta1: float = 0.9
    adamw_beta2: float = 0.95
    adamw_epsilon: float = 1e-8
    weight_decay: float = 0.0

    @property
    def kv_blocks(self) -> int:
        return -(-self.kv_tokens // self.kv_block_size)
