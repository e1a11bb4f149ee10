"""`lemix train publish`: a file of training batches or examples, with a progress bar."""

from collections.abc import Sequence
from statistics import fmean

from rich.console import Console
from rich.progress import Progress

from lemix.bus import open_bus
from lemix.printing import say
from lemix.publishing import BatchLine, check_batches, publish_batches
from lemix.run_choice import Target
from lemix.waiting import AppliedBatches, judged_weights
from services.trainer.intake.reading import id_of
from shared.bus.base import Bus, Stored
from shared.bus.permissions import Role
from shared.errors import BusError
from shared.messages.weights import NodeWeights

MAX_SHOWN = 5
"""Places in the stream that are listed."""
FOLLOW_STALL_S = 600.0
"""Without a training step for so long, nobody waits any more."""
ADVICE = (
    "lemix weights rollback takes the damage out, a lower LEMIX_LEARNING_RATE avoids it; "
    "LEMIX_MAX_SAMPLES_RISE and LEMIX_MAX_HELD_OUT_RISE are the limits"
)
VERDICT_S = 120.0
"""How long the guard's verdict on what was learnt is waited for."""


async def run_publish(
    batches: Sequence[BatchLine], target: Target, console: Console, *, follows: bool = False
) -> bool:
    """Publish all batches, and say where they are; `follows`: wait until they are trained, too, and judged.

    Returns False when a guard withholds what was learnt, or has not judged it after VERDICT_S.

    Raises InvalidBatchError naming the line that cannot be learnt from or published, BusError when no server
    answers, ProgressError for a batch that was rejected, or when training stands still for FOLLOW_STALL_S.
    """
    async with open_bus(target.nats_url, target.nats_users, Role.INGEST) as bus:
        applied = await AppliedBatches.following(bus)
        await _check(bus, batches, console)
        stored = await _publish(bus, batches, console)
        for line in outcome(stored):
            say(console, f"{target.label}: {line}")
        if not follows:
            return True
        ids = [batch.batch_id or id_of(at.sequence) for batch, at in zip(batches, stored, strict=True)]
        await _follow(applied, ids, console)
        say(console, f"{target.label}: {_lesson([applied.losses.get(each) for each in ids])}")
        judged = await judged_weights(bus, VERDICT_S)
        for node, version in judged:
            say(console, f"{target.label}: {verdict(node, version)}")
        return all(is_served(node, version) for node, version in judged)


async def _check(bus: Bus, batches: Sequence[BatchLine], console: Console) -> None:
    """Have the trainer check all lines; without one they are published all the same, as they are durable."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("checking", total=len(batches))
        try:
            async for _ in check_batches(bus, batches):
                progress.advance(bar)
        except BusError as error:
            say(console, f"not checked against the model, as no trainer answers: {error}")


async def _publish(bus: Bus, batches: Sequence[BatchLine], console: Console) -> list[Stored]:
    stored: list[Stored] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("publishing", total=len(batches))
        async for each in publish_batches(bus, batches):
            stored.append(each)
            progress.advance(bar)
    return stored


async def _follow(applied: AppliedBatches, batch_ids: Sequence[str], console: Console) -> None:
    """Show how far training is, and the loss of the batch that was trained last."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("training", total=len(set(batch_ids)))

        def on_applied(number: int) -> None:
            loss = next(reversed(applied.losses.values()), None)
            told = "training" if loss is None else f"training, loss {loss:.3f}"
            progress.update(bar, advance=number, description=told)

        await applied.wait_for(batch_ids, on_applied=on_applied, stall_s=FOLLOW_STALL_S)


def _lesson(losses: Sequence[float | None]) -> str:
    """How the loss went from the first tenth of the batches to the last; None: trained before, unseen."""
    seen = [loss for loss in losses if loss is not None]
    if not seen:
        return "trained before"
    if len(seen) == 1:
        return f"trained: loss {seen[0]:.3f}"
    tenth = max(1, len(seen) // 10)
    first, last = fmean(seen[:tenth]), fmean(seen[-tenth:])
    return f"trained: loss {first:.3f} at first, {last:.3f} in the end"


def is_served(node: NodeWeights, version: int) -> bool:
    """Whether a guarded node serves that version, or a later one."""
    return not (node.awaits_verdict(version) or node.withholds(version))


def verdict(node: NodeWeights, version: int) -> str:
    """Which version a guarded node serves, and what became of that newer one."""
    if node.published is None:
        return f"node {node.node} is being restored: what it learnt is not judged yet (lemix status tells)"
    serves = f"node {node.node} serves version {node.published}"
    if node.awaits_verdict(version):
        return f"{serves}; version {version} is not judged yet (lemix status tells)"
    if not node.withholds(version):
        return serves
    return f"{serves}; version {node.newest_judged} is withheld: {node.why_newest_withheld} ({ADVICE})"


def outcome(stored: Sequence[Stored]) -> list[str]:
    """Lines that tell a person of the batches that were published."""
    new = [each.sequence for each in stored if not each.is_repeat]
    repeated = [each.sequence for each in stored if each.is_repeat]
    lines = [f"{_batches(new)} stored, as {_listed(new)}"] if new else []
    if repeated:
        lines.append(
            f"{_batches(repeated)} already stored, as {_listed(repeated)}: an id is not taken again for two "
            "minutes (--again gives new ones)"
        )
    return lines


def _batches(sequences: Sequence[int]) -> str:
    return f"{len(sequences)} {'batch' if len(sequences) == 1 else 'batches'}"


def _listed(sequences: Sequence[int]) -> str:
    """`1`, `1 and 2`, `1, 2 and 3`; of many, the first ones."""
    shown = [str(sequence) for sequence in sequences[:MAX_SHOWN]]
    more = len(sequences) - MAX_SHOWN
    parts = [*shown, f"{more} more"] if more > 0 else shown
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
