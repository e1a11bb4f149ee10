"""Settings of training that follow from the model, and the line that tells of them."""

from math import isfinite
from pathlib import Path

from services.trainer.nodes.learning_rate import suitable_rate, suitable_warmup
from services.trainer.settings import TrainerSettings
from shared.model_files import approximate_num_weights
from shared.settings import EMBEDDED_MODEL

NUM_SAMPLES = 16
"""Texts that a model writes to be guarded by."""


def with_defaults(settings: TrainerSettings, model_folder: Path) -> TrainerSettings:
    """The settings with a learning rate, a warm-up and a number of samples.

    Raises ConfigurationError when the model's config cannot be read.
    """
    rate, warmup_batches = settings.learning_rate, settings.warmup_batches or 0
    if rate is None:
        num_weights = approximate_num_weights(model_folder)
        rate = suitable_rate(num_weights, is_adapter=settings.adapter != "none")
        if settings.warmup_batches is None:
            warmup_batches = suitable_warmup(settings.learning_rate_batches)
    num_samples = settings.guard_samples
    if num_samples is None:
        num_samples = 0 if settings.model == EMBEDDED_MODEL else NUM_SAMPLES
    return settings.model_copy(
        update={"learning_rate": rate, "warmup_batches": warmup_batches, "guard_samples": num_samples}
    )


def training_line(settings: TrainerSettings) -> str:
    """How a run trains, for people; `settings`: those of `with_defaults`."""
    warmup = f" after {settings.warmup_batches} batches of warm-up" if settings.warmup_batches else ""
    limit = settings.max_gradient_norm
    clipping = f"gradients clipped to {limit:g}" if isfinite(limit) else "gradients not clipped"
    what = "all weights" if settings.adapter == "none" else "a LoRA adapter"
    rate = f"learning rate {settings.learning_rate:.1e}{warmup}"
    bound = f"checkpoints of at most {settings.checkpoint_gb_per_hour:g} GB an hour"
    return f"training: {what}, {rate}, {clipping}, {bound}, {_guard(settings)}"


def _guard(settings: TrainerSettings) -> str:
    judges = []
    if settings.guard_samples:
        judges.append(f"{settings.guard_samples} texts of the model's own")
    if settings.held_out:
        judges.append(settings.held_out)
    if settings.hold_out_share:
        judges.append(f"{settings.hold_out_share:.1%} of what is published")
    if not judges:
        return "served at once (LEMIX_GUARD_SAMPLES has new versions judged first)"
    return f"served once {' and '.join(judges)} show no damage"
