"""Which of the trainer's settings its weights depend on."""

from services.trainer.settings import OF_TRAINING, TrainerSettings
from shared.settings import LemixSettings

OF_WHAT_IS_SAVED_AND_SERVED = {
    "checkpoint_every",
    "checkpoint_gb_per_hour",
    "keep_checkpoints",
    "keep_checkpoint_ages_s",
    "weights_consistency",
    "max_kept_versions",
    "held_out",
    "guard_samples",
    "max_samples_rise",
    "evaluate_every",
    "max_held_out_rise",
}
OF_WHEN_TRAINING_RESTS = {"max_skips", "max_pending"}
OF_A_RUN_THAT_BEGINS = {"train_from"}
OF_STAGES = {"adapter"}
"""They tell of it themselves."""


def test_every_setting_is_told_in_checkpoints_or_changes_no_weights() -> None:
    others = OF_WHAT_IS_SAVED_AND_SERVED | OF_WHEN_TRAINING_RESTS | OF_A_RUN_THAT_BEGINS | OF_STAGES
    own = TrainerSettings.model_fields.keys() - LemixSettings.model_fields.keys()
    assert own == {*OF_TRAINING, *others}
    assert others.isdisjoint(OF_TRAINING)
