"""How a running cluster stands: asked over the bus, shown as a table."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from lemix.bus import open_bus
from lemix.printing import new_table, print_table, say
from lemix.run_choice import Target
from shared.addresses import nats_address
from shared.bus.base import Bus
from shared.errors import BusError, ConfigurationError, NoResponderError
from shared.messages.cluster import ClusterStatus, Heartbeat, NodeStatus, StatusRequest
from shared.messages.weights import NodeWeights, WeightsRequest, WeightsStatus
from shared.subjects import NODE_WEIGHTS, STATUS

TIMEOUT_S = 5.0


async def fetch_status(bus: Bus) -> ClusterStatus:
    """Ask the scheduler. Raises NoResponderError when there is none."""
    return await bus.request(STATUS.at(), StatusRequest(), timeout_s=TIMEOUT_S)


async def fetch_weights(bus: Bus) -> WeightsStatus:
    """Ask the trainer. Raises NoResponderError when there is none."""
    return await bus.request(NODE_WEIGHTS.at(), WeightsRequest(), timeout_s=TIMEOUT_S)


async def run_status(target: Target, console: Console) -> None:
    """`lemix status`: ask, and print. Raises BusError."""
    async with open_bus(target.nats_url, target.nats_users) as bus:
        try:
            status = await fetch_status(bus)
        except NoResponderError:
            raise NoResponderError("NATS answers, but no scheduler is connected to it") from None
        print_table(console, status_table(status, target.label))
        say(console, objective_line(status))
        await print_training(bus, console)


async def print_training(bus: Bus, console: Console) -> None:
    """Print the trainer's report on weights; a line for each stopped node, or for a lost trainer."""
    try:
        weights = await fetch_weights(bus)
    except BusError as error:
        say(console, f"the trainer does not answer: {error}")
        return
    print_table(console, weights_table(weights))
    if any(node.judged for node in weights.nodes):
        print_table(console, judged_table(weights))
    for line in training_faults(weights):
        say(console, line)


def training_faults(weights: WeightsStatus) -> list[str]:
    """Faults that a person should know: nodes that train no more, or serve other weights than they train."""
    stopped = [
        f"node {node.node} trains no more: {node.halt_reason}; restart the trainer or roll back"
        for node in weights.nodes
        if node.halt_reason
    ]
    differing = [
        f"node {node.node} serves other weights than it trains: {node.why_differing}; restart its stages"
        for node in weights.nodes
        if node.why_differing
    ]
    return stopped + differing


async def require_unused(nats_url: str, nats_users: Path | None) -> None:
    """Raises ConfigurationError when a LeMix runs on that server already, BusError without a server.

    A second trainer would take the training batches away from the first.
    """
    async with open_bus(nats_url, nats_users) as bus:
        try:
            await fetch_status(bus)
        except NoResponderError:
            return
    place = nats_address(nats_url)
    raise ConfigurationError(f"a LeMix is already running on {place}; stop it, or use another server")


def objective_line(status: ClusterStatus) -> str:
    """The run's objective, and how it was kept since the scheduler's start."""
    first = f"first tokens are due after {status.slo_s:.3g} s (prompt of mean length)"
    others = "" if status.tbt_s is None else f", the next ones after {status.tbt_s:.3g} s"
    num_first = status.num_in_time + status.num_late
    kept = (
        f"{status.num_in_time / num_first:.1%} of {num_first} came in time" if num_first else "none has come"
    )
    return f"{first}{others}; {kept}; {status.num_refused} requests refused, {status.num_in_line} in line"


def num_ready(status: ClusterStatus) -> int:
    """How many nodes can take work."""
    return sum(node.ready for node in status.nodes)


def status_table(status: ClusterStatus, label: str) -> Table:
    """One row for each stage of the cluster that is called `label`; 80 columns wide at most.

    train: batches placed on the node; run and wait: requests there; queue: work items of the stage;
    KV: blocks used of all, the same on each stage of the node.
    """
    title = f"{label}: policy {status.policy}, {num_ready(status)} of {len(status.nodes)} nodes ready"
    table = new_table(title)
    for heading in ("node", "stage", "device", "ready"):
        table.add_column(heading, no_wrap=True)
    for heading in ("weights", "train", "run", "wait", "queue", "KV"):
        table.add_column(heading, no_wrap=True, justify="right")
    for node in status.nodes:
        for stage in sorted(node.stages, key=lambda stage: stage.stage):
            table.add_row(*_row(node, stage))
    return table


def _row(node: NodeStatus, stage: Heartbeat) -> tuple[str, ...]:
    is_head = stage.stage == 0
    return (
        str(stage.node),
        f"{stage.stage}/{stage.num_stages}",
        stage.device,
        "yes" if stage.ready else "no",
        _version(stage),
        str(node.training_tasks) if is_head else "",
        str(stage.running) if is_head else "",
        str(stage.waiting) if is_head else "",
        str(stage.queued),
        f"{stage.kv_blocks_used}/{stage.kv_blocks_total}" if is_head else "",
    )


def _version(stage: Heartbeat) -> str:
    sick = "" if stage.sick_version is None else f" (v{stage.sick_version} sick)"
    return f"v{stage.weights_version}{sick}"


def weights_table(status: WeightsStatus) -> Table:
    """One row for each node that the trainer knows; 80 columns wide at most.

    training: the loss of the newest batch; serves: the version that requests get; held-out, own text: its
    losses; withheld: how many versions the guard has kept from serving, and the last of them.
    """
    table = new_table("weights")
    for heading in ("node", "newest", "durable", "training", "serves", "held-out", "own text", "withheld"):
        table.add_column(heading, no_wrap=True)
    for node in status.nodes:
        table.add_row(*_weights_row(node))
    return table


def _weights_row(node: NodeWeights) -> tuple[str, ...]:
    return (
        str(node.node),
        f"v{node.version}",
        f"v{node.durable_version}",
        _loss(node.training_loss),
        _served(node),
        _loss(node.held_out_loss),
        _loss(node.samples_loss),
        f"{node.num_withheld} (v{node.last_withheld})" if node.num_withheld else "",
    )


def _served(node: NodeWeights) -> str:
    if node.published is not None:
        return f"v{node.published}"
    return "restoring" if node.is_guarded else "newest"


def judged_table(status: WeightsStatus) -> Table:
    """The newest verdicts of the guard on each node, oldest first: the curves of the three losses."""
    table = new_table("versions that the guard has judged")
    for heading in ("node", "version", "training", "held-out", "own text"):
        table.add_column(heading, no_wrap=True)
    table.add_column("verdict")
    for node in status.nodes:
        for each in node.judged:
            losses = map(_loss, (each.training_loss, each.held_out_loss, each.samples_loss))
            verdict = f"withheld: {each.why_withheld}" if each.why_withheld else "served"
            table.add_row(str(node.node), f"v{each.version}", *losses, verdict)
    return table


def _loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"
