"""`lemix weights`: which durable versions there are, going back to one, and taking one out of its run."""

from datetime import datetime
from pathlib import Path
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.table import Table

from lemix.bus import open_bus
from lemix.export import export_checkpoint
from lemix.run_folder import newest_running, newest_running_folder
from lemix.status import find_nats_url
from shared import checkpoints
from shared.checkpoints import Checkpoint
from shared.errors import ConfigurationError, NoResponderError
from shared.messages.base import Message
from shared.messages.weights import DurableVersion, DurableVersionsRequest, RollBackWeights
from shared.subjects import DURABLE_VERSIONS, ROLLBACK, RequestSubject

M = TypeVar("M", bound=Message)
R = TypeVar("R", bound=Message)

LIST_TIMEOUT_S = 30.0
ROLLBACK_TIMEOUT_S = 120.0
"""A checkpoint that is being written comes first."""
DEFAULT_RUN = "default"


async def run_list(nats_url: str | None, runs_dir: Path, name: str | None, console: Console) -> None:
    """Ask the running cluster; without one, or when a run is named, read the run's folder.

    Raises ConfigurationError or BusError.
    """
    if name is None and (nats_url or newest_running(runs_dir)):
        url = find_nats_url(nats_url, runs_dir)
        versions = (await _ask(url, DURABLE_VERSIONS.at(), DurableVersionsRequest(), LIST_TIMEOUT_S)).versions
    else:
        versions = tuple(checkpoints.durable_versions(_root(runs_dir, name), {}))
    console.print(versions_table(versions))


async def run_rollback(
    version: int, node: int | None, nats_url: str | None, runs_dir: Path, console: Console
) -> None:
    """Have the running trainer go back. Raises ConfigurationError, or RefusedError with the reason."""
    order = RollBackWeights(version=version, node=node)
    done = await _ask(find_nats_url(nats_url, runs_dir), ROLLBACK.at(), order, ROLLBACK_TIMEOUT_S)
    nodes = ", ".join(map(str, done.nodes))
    console.print(f"node {nodes}: back at version {version}; {done.num_discarded} batches are discarded")


def run_export(
    version: int, folder: Path, node: int | None, runs_dir: Path, name: str | None, console: Console
) -> None:
    """Copy a durable version out of its run. Raises ConfigurationError."""
    checkpoint = _find(_root(runs_dir, name), version, node)
    export_checkpoint(checkpoint, folder)
    console.print(
        f"version {version} of node {checkpoint.manifest.node} is in {folder}", markup=False, soft_wrap=True
    )


def versions_table(versions: tuple[DurableVersion, ...]) -> Table:
    """One row for each durable version."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("node", "version", "saved", "newest batch", "held-out loss", "served"):
        table.add_column(heading, overflow="fold")
    for each in versions:
        table.add_row(*_row(each))
    return table


def _row(each: DurableVersion) -> tuple[str, ...]:
    saved = datetime.fromtimestamp(each.created_wall_s).astimezone().isoformat(" ", "seconds")
    loss = "" if each.held_out_loss is None else f"{each.held_out_loss:.4f}"
    if each.num_ahead is None:
        served = "" if each.may_serve else "may not"
    elif each.num_ahead == 0:
        served = "yes"
    else:
        served = f"yes, and {each.num_ahead} batches more"
    return (str(each.node), str(each.version), saved, each.newest_batch_id, loss, served)


async def _ask(url: str, subject: RequestSubject[M, R], message: M, timeout_s: float) -> R:
    async with open_bus(url) as bus:
        try:
            return await bus.request(subject, message, timeout_s=timeout_s)
        except NoResponderError:
            raise NoResponderError("NATS answers, but no trainer is connected to it") from None


def _root(runs_dir: Path, name: str | None) -> Path:
    """The folder of checkpoints of the run of that name, else of the one that runs, else of the default."""
    running = newest_running_folder(runs_dir) if name is None else None
    return (running or runs_dir / (name or DEFAULT_RUN)) / "checkpoints"


def _find(root: Path, version: int, node: int | None) -> Checkpoint:
    """Raises ConfigurationError when there is none, or one on several nodes of which none is named."""
    every = [each for number in checkpoints.nodes(root) for each in checkpoints.checkpoints(root, number)]
    found = [
        each for each in every if each.manifest.version == version and node in (None, each.manifest.node)
    ]
    if len(found) == 1:
        return found[0]
    if found:
        nodes = ", ".join(str(each.manifest.node) for each in found)
        raise ConfigurationError(f"nodes {nodes} each have a version {version}: choose one with --node")
    there = ", ".join(f"{each.manifest.version} (node {each.manifest.node})" for each in every) or "none"
    of_node = "" if node is None else f" of node {node}"
    raise ConfigurationError(f"no durable version {version}{of_node} in {root}; there are: {there}")
