"""`lemix weights`: which durable versions there are, going back to one, and taking one out of its run."""

from datetime import datetime
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from lemix.bus import open_bus
from lemix.export import export_checkpoint
from lemix.printing import new_table, print_table, say
from lemix.run_choice import Target
from shared import checkpoints
from shared.errors import ConfigurationError, NoResponderError
from shared.messages.base import Message
from shared.messages.weights import DurableVersion, DurableVersionsRequest, RollBackWeights
from shared.subjects import DURABLE_VERSIONS, ROLLBACK, RequestSubject

M = TypeVar("M", bound=Message)
R = TypeVar("R", bound=Message)

LIST_TIMEOUT_S = 30.0
ROLLBACK_TIMEOUT_S = 120.0
"""A checkpoint that is being written comes first."""


async def run_list(target: Target, console: Console, now_wall_s: float) -> None:
    """Ask the trainer of a running cluster. Raises BusError."""
    answer = await _ask(target, DURABLE_VERSIONS.at(), DurableVersionsRequest(), LIST_TIMEOUT_S)
    print_table(console, versions_table(answer.versions, target.label, now_wall_s))


def list_folder(root: Path, console: Console, now_wall_s: float) -> None:
    """Read the checkpoints of a run that is not running."""
    versions = tuple(checkpoints.durable_versions(root, {}))
    print_table(console, versions_table(versions, f"run {root.parent.name}, not running", now_wall_s))


async def run_rollback(version: int, node: int | None, target: Target, console: Console) -> None:
    """Have the running trainer go back. Raises BusError, RefusedError with the reason among them."""
    order = RollBackWeights(version=version, node=node)
    done = await _ask(target, ROLLBACK.at(), order, ROLLBACK_TIMEOUT_S)
    nodes = ", ".join(map(str, done.nodes))
    count = done.num_discarded
    discarded = f"{count} {'batch is' if count == 1 else 'batches are'} discarded"
    say(console, f"{target.label}, node {nodes}: back at version {version}; {discarded}")


def run_export(version: int, folder: Path, node: int | None, root: Path, console: Console) -> None:
    """Copy a durable version out of the run whose checkpoints are in `root`. Raises ConfigurationError."""
    if version == checkpoints.GIVEN_VERSION:
        raise ConfigurationError("version 0 is the model as it was given to the run: it needs no export")
    checkpoint = checkpoints.find(root, version, node)
    export_checkpoint(checkpoint, folder)
    say(
        console,
        f"version {version} of node {checkpoint.manifest.node} of run {root.parent.name} is in {folder}",
    )


def versions_table(versions: tuple[DurableVersion, ...], label: str, now_wall_s: float) -> Table:
    """One row for each durable version of the run that is called `label`."""
    table = new_table(f"{label}: durable versions")
    for heading in ("node", "version", "saved", "age", "newest batch", "held-out loss", "own text", "served"):
        table.add_column(heading, overflow="fold")
    for each in versions:
        table.add_row(*_row(each, now_wall_s))
    return table


def _row(each: DurableVersion, now_wall_s: float) -> tuple[str, ...]:
    if each.version == checkpoints.GIVEN_VERSION:
        saved, age = "the model as it was given", ""
    else:
        saved = datetime.fromtimestamp(each.created_wall_s).astimezone().isoformat(" ", "seconds")
        age = age_of(now_wall_s - each.created_wall_s)
    losses = ("" if loss is None else f"{loss:.4f}" for loss in (each.held_out_loss, each.samples_loss))
    if each.num_ahead is None:
        served = "" if each.may_serve else "may not"
    elif each.num_ahead == 0:
        served = "yes"
    else:
        served = f"yes, and {each.num_ahead} {'batch' if each.num_ahead == 1 else 'batches'} more"
    return (str(each.node), str(each.version), saved, age, each.newest_batch_id, *losses, served)


def age_of(seconds: float) -> str:
    """In whole units, the largest of which there are two: `95 s`, `119 min`, `47 h`, `3 d`."""
    for unit_s, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit_s:
            return f"{int(seconds // unit_s)} {name}"
    return f"{max(int(seconds), 0)} s"


async def _ask(target: Target, subject: RequestSubject[M, R], message: M, timeout_s: float) -> R:
    async with open_bus(target.nats_url, target.nats_users) as bus:
        try:
            return await bus.request(subject, message, timeout_s=timeout_s)
        except NoResponderError:
            raise NoResponderError("NATS answers, but no trainer is connected to it") from None
