from msgspec import structs
from rich.console import Console

from lemix.status import (
    judged_table,
    objective_line,
    print_training,
    status_table,
    training_faults,
    weights_table,
)
from shared.bus.base import Incoming
from shared.bus.memory import MemoryBroker
from shared.messages.cluster import ClusterStatus, Heartbeat, NodeStatus
from shared.messages.weights import JudgedVersion, NodeWeights, WeightsRequest, WeightsStatus
from shared.subjects import NODE_WEIGHTS


def heartbeat(node: int, stage: int, version: int, sick_version: int | None = None) -> Heartbeat:
    return Heartbeat(
        node=node,
        stage=stage,
        num_stages=2,
        instance="i",
        model="m",
        device="cuda:0",
        ready=True,
        weights_version=version,
        sick_version=sick_version,
        checkpoint="",
        fence=1,
        running=12,
        waiting=100,
        queued=3,
        kv_blocks_used=1000,
        kv_blocks_total=1024,
    )


def status(*versions: tuple[int, int]) -> ClusterStatus:
    """One node for each pair: the weights versions of its two stages."""
    nodes = tuple(
        NodeStatus(
            node=node,
            ready=True,
            inference_tasks=3,
            training_tasks=1,
            stages=tuple(heartbeat(node, stage, version) for stage, version in enumerate(pair)),
        )
        for node, pair in enumerate(versions)
    )
    return ClusterStatus(policy="round_robin", nodes=nodes)


def test_a_line_tells_the_objective_and_how_it_was_kept() -> None:
    busy = ClusterStatus(
        policy="lemix",
        nodes=(),
        slo_s=0.25,
        tbt_s=0.1,
        num_in_time=3,
        num_late=1,
        num_refused=5,
        num_in_line=2,
    )
    assert objective_line(busy) == (
        "first tokens are due after 0.25 s (prompt of mean length), the next ones after 0.1 s; "
        "75.0% of 4 came in time; 5 requests refused, 2 in line"
    )
    assert "none has come; 0 requests refused" in objective_line(ClusterStatus(policy="lemix", nodes=()))


def test_a_version_whose_logits_are_not_finite_is_marked() -> None:
    stages = (heartbeat(0, 0, 7), heartbeat(0, 1, 7, sick_version=6))
    node = NodeStatus(node=0, ready=True, inference_tasks=0, training_tasks=0, stages=stages)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(status_table(ClusterStatus(policy="lemix", nodes=(node,)), "run demo"))
    assert capture.get().count("v7 (v6 sick)") == 1


def test_the_table_shows_every_stage_whole_within_80_columns() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(status_table(status((123, 124), (5, 5)), "run demo"))
    shown = capture.get()
    assert "run demo: policy round_robin, 2 of 2 nodes ready" in shown
    assert "…" not in shown
    rows = [line.split() for line in shown.splitlines() if "cuda:0" in line]
    assert rows == [
        ["0", "0/2", "cuda:0", "yes", "v123", "1", "12", "100", "3", "1000/1024"],
        ["0", "1/2", "cuda:0", "yes", "v124", "3"],
        ["1", "0/2", "cuda:0", "yes", "v5", "1", "12", "100", "3", "1000/1024"],
        ["1", "1/2", "cuda:0", "yes", "v5", "3"],
    ]


def weights(node: int, halt_reason: str = "") -> NodeWeights:
    """Of a node without a guard."""
    return NodeWeights(
        node=node,
        version=5,
        durable_version=0,
        published=None,
        held_out_loss=None,
        samples_loss=None,
        num_withheld=0,
        last_withheld=None,
        halt_reason=halt_reason,
    )


def test_the_weights_table_shows_what_is_served_and_what_is_withheld() -> None:
    guarded = NodeWeights(
        node=0,
        version=130,
        durable_version=128,
        published=64,
        held_out_loss=1.25,
        samples_loss=0.5,
        num_withheld=2,
        last_withheld=128,
        training_loss=2.5,
        is_guarded=True,
    )
    plain = weights(node=1)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(weights_table(WeightsStatus(nodes=(guarded, plain))))
    rows = [line.split() for line in capture.get().splitlines() if "v" in line]
    assert rows[1:] == [
        ["0", "v130", "v128", "2.5000", "v64", "1.2500", "0.5000", "2", "(v128)"],
        ["1", "v5", "v0", "newest"],
    ]


def test_the_curves_of_judged_versions_are_shown_with_the_verdicts() -> None:
    judged = (
        JudgedVersion(version=16, judged_wall_s=1.0, training_loss=2.0, held_out_loss=1.5, samples_loss=0.5),
        JudgedVersion(version=32, judged_wall_s=2.0, training_loss=1.0, why_withheld="too high"),
    )
    node = structs.replace(weights(node=3), judged=judged)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(judged_table(WeightsStatus(nodes=(node,))))
    assert [line.split() for line in capture.get().splitlines()][-3:-1] == [
        ["3", "v16", "2.0000", "1.5000", "0.5000", "served"],
        ["3", "v32", "1.0000", "withheld:", "too", "high"],
    ]


async def test_a_node_that_trains_no_more_and_a_lost_trainer_are_told_of() -> None:
    broker = MemoryBroker()
    bus, trainer = broker.connect(), broker.connect()
    console = Console(record=True, width=120)
    await print_training(bus, console)
    assert console.export_text().startswith("the trainer does not answer: lemix.weights.nodes")
    told = tuple(weights(node=node, halt_reason=reason) for node, reason in enumerate(("", "why")))

    async def answer(_: Incoming[WeightsRequest]) -> WeightsStatus:
        return WeightsStatus(nodes=told)

    await trainer.respond(NODE_WEIGHTS.at(), answer)
    await print_training(bus, console)

    stopped = [line for line in console.export_text().splitlines() if "no more" in line]
    assert stopped == ["node 1 trains no more: why; restart the trainer or roll back"]
    told = (structs.replace(weights(node=2), why_differing="version 5: far off"),)
    assert training_faults(WeightsStatus(nodes=told)) == [
        "node 2 serves other weights than it trains: version 5: far off; restart its stages"
    ]
    for each in (bus, trainer):
        await each.close()
