"""`lemix profile`: measure a model's stages on this machine's device, and write what forecasts start from."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console

from lemix.arenas import ArenaFolder, default_base
from lemix.printing import say
from lemix.profiling.grid import Grid, grid_for
from lemix.profiling.memory import stage_memory
from lemix.profiling.pipeline import MeasuredOp, ProfiledPipeline, profiled_pipeline
from shared.clock import Clock
from shared.errors import ConfigurationError
from shared.model.loader import model_partition, read_config
from shared.model_files import CONFIG_FILES, WEIGHT_FILES, ModelCard, name_of, read_card, resolve
from shared.profiles.profile import REFERENCE_TOKENS, Profile
from shared.profiles.records import ProfilePoint, StageProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileOptions:
    """A person's choices for a profile."""

    model: str
    """A folder or a hub name."""
    stages: int
    device: str
    output: Path
    is_quick: bool


async def run_profile(options: ProfileOptions, console: Console, clock: Clock) -> None:
    """Measure, write the file, and say what came of it.

    Raises LemixError when the model cannot be split so, or the file cannot be written.
    """
    profile = await measured_profile(options, clock)
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(profile.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise ConfigurationError(f"output {str(options.output)!r}: {error.strerror}") from error
    num_points = sum(len(stage.points) for stage in profile.stages)
    forward_ms = 1000 * profile.model_forward_s(profile.reference_tokens)
    say(
        console,
        f"{num_points} points of {profile.num_stages} stages; {profile.reference_tokens} tokens alone"
        f" take {forward_ms:.2f} ms; written to {options.output}",
    )


async def measured_profile(options: ProfileOptions, clock: Clock) -> Profile:
    """The medians of some repeats of each op of the grid."""
    folder = resolve(options.model, CONFIG_FILES + WEIGHT_FILES)
    card = read_card(folder, name_of(options.model))
    grid = grid_for(card.context_length, is_quick=options.is_quick)
    arenas = ArenaFolder.create(default_base())
    try:
        async with profiled_pipeline(
            model=options.model,
            num_stages=options.stages,
            device=options.device,
            kv_tokens=grid.kv_tokens,
            folder=arenas.path,
            clock=clock,
        ) as pipeline:
            measured = await measure(pipeline, grid)
    finally:
        arenas.remove()
    return profile_of(measured, folder, card, options)


async def measure(pipeline: ProfiledPipeline, grid: Grid) -> list[MeasuredOp]:
    """All ops of the grid in turn, `num_repeats` times, every other time backwards; the first turn is lost.

    What else the machine does at times so falls upon all of them, and not upon the repeats of one.
    """
    measured: list[MeasuredOp] = []
    for turn in range(grid.num_repeats + 1):
        ops = await _turn(pipeline, grid, order=1 if turn % 2 else -1)
        measured.extend(ops if turn > 0 else ())
    return measured


async def _turn(pipeline: ProfiledPipeline, grid: Grid, *, order: int) -> list[MeasuredOp]:
    batches = [await pipeline.batch(lengths) for lengths in grid.microbatches[::order]]
    await pipeline.iteration(grid.iterations[0])  # the first one after a step packs the weights anew
    iterations = [await pipeline.iteration(shape) for shape in grid.iterations[::order]]
    return [op for ops in (*batches, *iterations) for op in ops]


def profile_of(
    measured: Sequence[MeasuredOp], folder: Path, card: ModelCard, options: ProfileOptions
) -> Profile:
    """Put the measurements of the model in `folder` together as a profile."""
    stages = []
    for layers in model_partition(read_config(folder), options.stages):
        own = [op for op in measured if op.stage == layers.stage]
        steps = [op.elapsed_s for op in own if op.kind == "step"]
        memory = stage_memory(folder, layers, options.device, own)
        stages.append(StageProfile(points=medians(own), step_s=median(steps), memory=memory))
    return Profile(
        model=card.name,
        device=options.device,
        num_stages=options.stages,
        vocab_size=card.vocab_size,
        context_length=card.context_length,
        reference_tokens=REFERENCE_TOKENS,
        stages=tuple(stages),
    )


def medians(measured: Sequence[MeasuredOp]) -> tuple[ProfilePoint, ...]:
    """A point for each kind and size of op but the step."""
    repeats = defaultdict(list)
    for op in measured:
        if op.kind != "step":
            repeats[op.kind, op.work].append(op.elapsed_s)
    return tuple(
        ProfilePoint.of(kind, work, median(elapsed_s)) for (kind, work), elapsed_s in repeats.items()
    )
