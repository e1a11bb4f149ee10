"""Settings of the trainer."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, PositiveFloat, model_validator
from pydantic_settings import NoDecode

from shared.messages.weights import ServingRule
from shared.schedule import Feeding, MergeName, ScheduleName, StashingName
from shared.settings import LemixSettings, split_commas

TrainFrom = Literal["first", "next"]

OF_TRAINING = (
    "schedule",
    "stashing",
    "microbatches",
    "max_microbatch_tokens",
    "merge",
    "merge_every",
    "outer_learning_rate",
    "outer_momentum",
    "checkpoint_idle_s",  # nodes that are merged every so often also are when there is no work for so long
    "learning_rate",
    "learning_rate_schedule",
    "warmup_batches",
    "learning_rate_batches",
    "final_learning_rate",
    "max_gradient_norm",
    "hold_out_share",
)
"""Settings that the weights depend on."""


class TrainerSettings(LemixSettings):
    """How batches become microbatches, steps and checkpoints."""

    schedule: ScheduleName = "async"
    """`async` (A-PP): no flush between batches; `1f1b`, `gpipe` (S-PP): a batch waits for the last step."""
    stashing: StashingName = "full"
    """Old weights kept for microbatches in flight; `double`: two versions, so that batches wait for room."""
    microbatches: int = Field(default=4, ge=1)
    """Parts that a batch is cut into; more when they would be too large."""
    max_microbatch_tokens: int = Field(default=2048, ge=2, le=65_536)
    """Tokens in a microbatch at most; the upper limit keeps its message below 1 MiB."""
    merge: MergeName = "none"
    """How the nodes' weights become one: never; as their mean, or by DiLoCo's outer step on it, every
    `merge_every` batches; or step by step, by the mean of their gradients."""
    merge_every: int = Field(default=16, ge=1)
    """Batches of each node, on average, between two merges."""
    outer_learning_rate: float = Field(default=0.7, gt=0)
    outer_momentum: float = Field(default=0.9, ge=0, lt=1)
    learning_rate: float | None = Field(default=None, ge=0)
    """The highest of the schedule; None: what suits the size of the model, and what trains."""
    adapter: Literal["none", "lora"] = "none"
    """The same as on the stages: the learning rate that suits an adapter is another."""
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How it falls after the warm-up, until `learning_rate_batches`."""
    warmup_batches: int | None = Field(default=None, ge=0)
    """Batches of the run over which the learning rate rises from 0; None: a few, none for a given rate."""
    learning_rate_batches: int = Field(default=0, ge=0)
    """Batches of the run after which it has fallen to `final_learning_rate`."""
    final_learning_rate: float = Field(default=0.0, ge=0)
    max_gradient_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm over all stages; `inf`: never."""
    max_skips: int = Field(default=3, ge=1)
    """Batches in a row without finite gradients, after which a node trains no more."""
    checkpoint_every: int = Field(default=16, ge=1)
    """Applied batches of a node between two of its checkpoints."""
    checkpoint_idle_s: float = Field(default=2.0, ge=0)
    """A node without training for so long saves what it has learnt since its last checkpoint."""
    checkpoint_gb_per_hour: float = Field(default=180.0, gt=0)
    """A node's checkpoints write no more than so many gigabytes an hour in the mean: the next one waits."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints of each node that are kept; with a guard also the newest that may serve."""
    keep_checkpoint_ages_s: Annotated[tuple[PositiveFloat, ...], NoDecode, BeforeValidator(split_commas)] = (
        3600.0,
        86400.0,
    )
    """For each of these ages, separated by commas, a checkpoint that is as old is kept, and the next one that
    will be."""
    weights_consistency: Literal["latest", "pinned"] = "latest"
    """`pinned`: a request ends with the weights version that it began with, on all stages."""
    max_kept_versions: int = Field(default=2, ge=2)
    """Versions that stages keep for serving at once; while all are in use, no newer one is published.

    Requests of so many versions take turns: with 2, a request waits for one other iteration at most.
    """
    held_out: str = ""
    """A file of examples, one a line; versions that do much worse on them are not served. Empty: none."""
    hold_out_share: float = Field(default=0.0, ge=0, lt=1)
    """So much of the published examples is held out by the run itself, up to a number, and not trained."""
    guard_samples: int | None = Field(default=None, ge=0)
    """Texts that the model writes before it learns; versions that find them far less likely do not serve.

    None: 16, and none of the model that comes with the project, which is there to learn."""
    evaluate_every: int = Field(default=16, ge=1)
    """Steps of a node between two versions that are evaluated and saved, and then served, with a guard.

    One is too when there is no more work."""
    max_held_out_rise: float = Field(default=0.05, ge=0)
    """How much higher a version's held-out loss may be, as a share of the lowest that has served."""
    max_samples_rise: float = Field(default=1.0, ge=0)
    """How much higher its loss on the model's own samples may be than before any training, in nats."""
    max_pending: int = Field(default=1024, ge=1)
    """Batches held until a checkpoint contains them; reading stops there while checkpoints fail."""
    train_from: TrainFrom = "first"
    """Where a run without checkpoints begins: at the `first` batch of the stream or at the `next` to come."""

    @property
    def merging(self) -> MergeName:
        """The way weights become one; `dp` is the mean of gradients over nodes of one stage."""
        return "allreduce" if self.schedule == "dp" else self.merge

    @property
    def feeding(self) -> Feeding:
        """How microbatches enter nodes."""
        return Feeding(schedule=self.schedule)

    @property
    def shares_weights(self) -> bool:
        """Whether all nodes have the same weights, after each merge at least."""
        return self.merging != "none"

    @property
    def serving(self) -> ServingRule:
        """Which weights the stages serve."""
        if self.weights_consistency == "pinned":
            return "pinned"
        return "published" if self.is_guarded else "newest"

    @property
    def is_guarded(self) -> bool:
        """Whether versions are evaluated before they serve."""
        return bool(self.held_out or self.hold_out_share or self.guard_samples)

    @model_validator(mode="after")
    def _schedules_have_an_end(self) -> Self:
        warmup_batches = self.warmup_batches or 0
        if self.learning_rate_schedule != "constant" and self.learning_rate_batches <= warmup_batches:
            raise ValueError(
                f"learning_rate_schedule={self.learning_rate_schedule} needs learning_rate_batches above "
                f"warmup_batches={warmup_batches}, not {self.learning_rate_batches}"
            )
        return self
