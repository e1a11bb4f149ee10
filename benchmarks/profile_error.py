"""How far forecasts are off on the real CPU model: a profile, then ops of sizes that it does not contain.

Each op is forecast just before it runs and observed just after it, as the scheduler does it.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.models import model_folder
from lemix.arenas import ArenaFolder, default_base
from lemix.profiling.command import ProfileOptions, measure, profile_of
from lemix.profiling.grid import MAX_ROWS, IterationShape, decoding, grid_for, mixed, prefill
from lemix.profiling.pipeline import MeasuredOp, ProfiledPipeline, profiled_pipeline
from services.scheduler.costs import COSTS, Costs, costs_named
from shared.clock import Clock, SystemClock
from shared.model_files import name_of, read_card
from shared.profiles.profile import Profile
from shared.settings import EMBEDDED_MODEL

NUM_STAGES = 2
NUM_HELD_OUT = 150
HOP_S = 0.0005


def held_out_shapes(rng: random.Random, context_length: int) -> list[IterationShape]:
    """Prompts, pieces of prompts, decoding, and decoding with either, of any size in between."""
    shapes = []
    for _ in range(NUM_HELD_OUT // 5):
        length, start = rng.randint(2, 400), rng.randint(1, context_length - 401)
        size, context = rng.randint(1, 24), rng.randint(8, 600)
        shapes += [
            prefill(0, length),
            prefill(start, rng.randint(2, 200)),
            decoding(size, context),
            mixed(size, context, 0, length),
            mixed(size, context, start, rng.randint(2, 200)),
        ]
    rng.shuffle(shapes)
    return shapes


def held_out_batches(rng: random.Random) -> list[tuple[int, ...]]:
    """Microbatches of examples of different lengths."""
    batches = (tuple(rng.randint(8, 300) for _ in range(rng.randint(1, 6))) for _ in range(NUM_HELD_OUT // 5))
    return [lengths for lengths in batches if sum(lengths) <= MAX_ROWS]


def predicted_s(costs: Costs, op: MeasuredOp) -> float:
    """The time of an op as `costs` predict it."""
    if op.kind == "step":
        return costs.step_s(op.stage)
    price = {"iteration": costs.iteration_s, "forward": costs.forward_s, "backward": costs.backward_s}
    return price[op.kind](op.stage, op.work)


class Errors:
    """Absolute relative errors by kind of op, for one cost model."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._errors: dict[str, list[float]] = defaultdict(list)

    def note(self, op: MeasuredOp) -> None:
        self._errors[op.kind].append(abs(predicted_s(self._costs, op) - op.elapsed_s) / op.elapsed_s)
        self._costs.observe(op.stage, op.kind, op.work, op.elapsed_s)

    def summary(self) -> dict[str, Any]:
        return {
            kind: {"mean": fmean(errors), "median": median(errors), "num_ops": len(errors)}
            for kind, errors in self._errors.items()
        }


async def _held_out_ops(pipeline: ProfiledPipeline, context_length: int) -> list[MeasuredOp]:
    rng = random.Random(0)
    batches = [await pipeline.batch(lengths) for lengths in held_out_batches(rng)]
    await pipeline.iteration(prefill(0, 8))  # packs the weights anew
    shapes = held_out_shapes(rng, context_length)
    iterations = [await pipeline.iteration(shape) for shape in shapes]
    return [op for ops in (*batches, *iterations) for op in ops]


async def measured_ops(folder: Path, clock: Clock) -> tuple[Profile, list[MeasuredOp]]:
    """A profile of the model in `folder`, and ops that it does not contain."""
    card = read_card(folder, name_of(str(folder)))
    grid = grid_for(card.context_length, is_quick=False)
    options = ProfileOptions(
        model=str(folder), stages=NUM_STAGES, device="cpu", output=Path("unused"), is_quick=False
    )
    arenas = ArenaFolder.create(default_base())
    try:
        async with profiled_pipeline(
            model=str(folder),
            num_stages=NUM_STAGES,
            device="cpu",
            kv_tokens=2 * grid.kv_tokens,
            folder=arenas.path,
            clock=clock,
        ) as pipeline:
            measured = await measure(pipeline, grid)
            held_out = await _held_out_ops(pipeline, card.context_length)
    finally:
        arenas.remove()
    return profile_of(measured, folder, card, options), held_out


def errors_of(profile: Profile, held_out: Sequence[MeasuredOp]) -> dict[str, Any]:
    """By cost model and kind of op, its absolute relative errors."""
    summaries = {}
    for name in COSTS:
        errors = Errors(costs_named(name, profile, HOP_S))
        for op in held_out:
            errors.note(op)
        summaries[name] = errors.summary()
    return summaries


async def main(work: Path) -> dict[str, Any]:
    clock, folders = SystemClock(), {"embedded": Path(EMBEDDED_MODEL)}
    folders["small"] = model_folder("small", work / "models")
    return {name: errors_of(*await measured_ops(folder, clock)) for name, folder in folders.items()}
