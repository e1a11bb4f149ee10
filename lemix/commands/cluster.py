"""`lemix up`, `demo` and `status`: a whole cluster on this machine."""

import os
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lemix.commands.options import (
    Device,
    Emulate,
    Model,
    NatsUrl,
    NodeProfile,
    Nodes,
    Policy,
    Port,
    RunName,
    RunsDir,
    Stages,
)
from lemix.printing import Output, print_table, say, say_error
from lemix.run_choice import find_running
from shared.clock import SystemClock

if TYPE_CHECKING:
    from lemix.topology import ClusterOptions

INTERRUPTED = 130

RootPath = Annotated[
    str,
    typer.Option(
        help="Path prefix under which a proxy serves the API.", envvar="LEMIX_ROOT_PATH", show_default="none"
    ),
]
Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure",
        help="Listen where others reach it, although nobody needs a key.",
        envvar="LEMIX_INSECURE",
    ),
]
NatsPort = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=65535,
        help="Of the run's own NATS server, which keeps it.",
        show_default="a free one, chosen once",
    ),
]
StagesPerWorker = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Consecutive stages that one process holds.",
        show_default="all of a node; 1 if emulated",
    ),
]
StartTimeout = Annotated[
    float, typer.Option(min=1, help="Seconds until something must answer; downloads and loading count.")
]


def up(
    nodes: Nodes = 2,
    stages: Stages = 2,
    stages_per_worker: StagesPerWorker = None,
    model: Model = None,
    policy: Policy = None,
    device: Device = None,
    emulate: Emulate = None,
    node_profile: NodeProfile = None,
    host: Annotated[str, typer.Option(help="Address on which the HTTP API listens.")] = "127.0.0.1",
    port: Port = 8000,
    name: Annotated[str, typer.Option(help="Files of the run go under runs/NAME.")] = "default",
    runs_dir: RunsDir = Path("runs"),
    nats_url: NatsUrl = None,
    root_path: RootPath = "",
    insecure: Insecure = False,
    nats_port: NatsPort = None,
    start_timeout: StartTimeout = 600.0,
) -> None:
    """Start everything on this machine, and keep it running until Ctrl-C."""
    from lemix.node_profiles import profiles_by_node
    from lemix.preflight import check_start, with_fitting_adapter
    from lemix.running import run_command
    from lemix.topology import ClusterOptions
    from lemix.up import run_up

    options = ClusterOptions(
        name=name,
        runs_dir=runs_dir,
        nodes=nodes,
        stages=stages,
        stages_per_worker=stages_per_worker,
        devices=tuple(device or ["cpu"]),
        emulate=emulate,
        node_profiles=profiles_by_node(node_profile or ()),
        model=model,
        policy=policy,
        host=host,
        port=port,
        root_path=root_path,
        insecure=insecure,
        nats_url=nats_url,
        nats_port=nats_port,
        start_timeout_s=start_timeout,
    )
    check_start(options, os.environ)
    options, why_adapter = with_fitting_adapter(options, os.environ)
    run_command(run_up(options, Output(), SystemClock(), why_adapter=why_adapter))


def demo(
    nodes: Nodes = 2,
    stages: Stages = 2,
    seconds: Annotated[float, typer.Option(min=1, help="How long requests arrive.")] = 60.0,
    rate: Annotated[float, typer.Option(min=0.01, help="Requests per second, Poisson.")] = 2.0,
    batches: Annotated[int, typer.Option(min=1, help="Training batches to publish.")] = 64,
    device: Device = None,
    model: Model = None,
    runs_dir: RunsDir = Path("runs"),
    nats_url: NatsUrl = None,
) -> None:
    """Serve and train at once for a minute, and show what came of it."""
    from lemix.lab_extra import check_lab

    check_lab()
    from lemix.topology import ClusterOptions

    options = ClusterOptions(
        name="demo",
        runs_dir=runs_dir,
        nodes=nodes,
        stages=stages,
        devices=tuple(device or ["cpu"]),
        model=model,
        # Both replicas must be measured alike (see held_out.py).
        policy="round_robin",
        nats_url=nats_url,
    )
    sys.exit(_demo(options, seconds=seconds, rate=rate, num_batches=batches))


def _demo(cluster: "ClusterOptions", *, seconds: float, rate: float, num_batches: int) -> int:
    """Run it and print its table; returns the exit status."""
    from lemix.demo import PICTURE_FILE, SUMMARY_FILE, DemoOptions, run_demo
    from lemix.demo_data import DemoData
    from lemix.demo_view import DemoView, summary_table
    from lemix.preflight import check_start
    from lemix.running import run_command
    from shared.settings import LemixSettings, read_settings

    check_start(cluster, os.environ)
    console = Output()
    options = DemoOptions(seconds=seconds, requests_per_s=rate)
    data = DemoData.load(
        num_batches=num_batches,
        run_id=f"demo-{secrets.token_hex(4)}",
        model=cluster.model or read_settings(LemixSettings).model,
        clock=SystemClock(),
    )
    with DemoView(console) as view:
        summary = run_command(run_demo(cluster, options, data, view, SystemClock()))
    if summary is None:
        return INTERRUPTED
    print_table(console, summary_table(summary))
    for what, name in (("numbers", SUMMARY_FILE), ("picture", PICTURE_FILE)):
        say(console, f"{what}: {cluster.run_dir / name}")
    for fault in summary.faults():
        say_error(fault)
    return 1 if summary.faults() else 0


def status(nats_url: NatsUrl = None, runs_dir: RunsDir = Path("runs"), name: RunName = None) -> None:
    """Show nodes, stages, weights versions and queues of the running cluster."""
    from lemix.running import run_command
    from lemix.status import run_status

    run_command(run_status(find_running(nats_url, runs_dir, name), Output()))
