"""A stage worker whose device is emulated: the real service and bus, an executor that only takes its time."""

from services.stage_worker.compute.emulated import EmulatedExecutor
from services.stage_worker.compute.hold import Hold
from services.stage_worker.settings import StageWorkerSettings
from shared.clock import Clock
from shared.model_files import CONFIG_FILES, name_of, read_card, resolve
from shared.profiles.profile import profile_named, stage_times
from shared.slices import NumSlices


def emulated_settings(settings: StageWorkerSettings) -> StageWorkerSettings:
    """The emulated device in the real one's place, with its room for keys and values unless that is set.

    Raises ConfigurationError when there is no such profile.
    """
    profile = profile_named(settings.emulate, settings.num_stages)
    kv_tokens = profile.kv_tokens if settings.kv_tokens is None else settings.kv_tokens
    return settings.model_copy(update={"device": settings.emulate, "kv_tokens": kv_tokens})


def emulated_executor(settings: StageWorkerSettings, instance: str, clock: Clock) -> EmulatedExecutor:
    """Raises ConfigurationError when there is no such profile, or no such model.

    Tokens are of the model that the gateway serves, which must have words for them;
    all else is the profile's.
    """
    profile = profile_named(settings.emulate, settings.num_stages)
    num_slices = settings.num_slices(profile.stages[settings.stage].num_layers)
    card = read_card(resolve(settings.model, CONFIG_FILES), name_of(settings.model))
    return EmulatedExecutor(
        settings,
        instance,
        times=stage_times(settings.emulate, settings.stage, settings.num_stages),
        memory=profile.stages[settings.stage].memory,
        vocab_size=card.vocab_size,
        context_length=profile.context_length,
        num_slices=NumSlices(num_slices, num_slices),
        hold_until=Hold(clock).until,
        clock=clock,
    )
