"""The command `lemix`. What takes long to import is imported by the command that needs it."""

import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from shared.clock import SystemClock
from shared.errors import LemixError

if TYPE_CHECKING:
    from lemix.topology import ClusterOptions

INTERRUPTED = 130

app = typer.Typer(
    help="Serve and train one language model on the same devices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
train = typer.Typer(help="Training batches.", no_args_is_help=True)
app.add_typer(train, name="train")

Nodes = Annotated[int, typer.Option(min=1, help="Replicas of the model.")]
Stages = Annotated[int, typer.Option(min=1, help="Pipeline stages of each node.")]
Model = Annotated[
    str | None,
    typer.Option(
        help="A folder in Hugging Face format, or a hub name.",
        envvar="LEMIX_MODEL",
        show_default="the embedded model",
    ),
]
Policy = Annotated[
    str | None,
    typer.Option(help="The scheduler's policy.", envvar="LEMIX_POLICY", show_default="round_robin"),
]
Device = Annotated[
    list[str] | None,
    typer.Option(help="cpu or cuda:N; repeat it to deal several out to the stages.", show_default="cpu"),
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Of the HTTP API; 0 takes a free one.")]
NatsUrl = Annotated[
    str | None,
    typer.Option(
        help="A running NATS server with JetStream.", envvar="LEMIX_NATS_URL", show_default="one of its own"
    ),
]
RunsDir = Annotated[Path, typer.Option(help="Where the files of runs lie.")]


def main() -> None:
    """Entry point: an expected error is one clear line and exit status 1, never a traceback."""
    try:
        app()
    except LemixError as error:
        _fail(str(error))


@app.command()
def up(
    nodes: Nodes = 2,
    stages: Stages = 2,
    model: Model = None,
    policy: Policy = None,
    device: Device = None,
    host: Annotated[str, typer.Option(help="Address on which the HTTP API listens.")] = "127.0.0.1",
    port: Port = 8000,
    name: Annotated[str, typer.Option(help="Files of the run go under runs/NAME.")] = "default",
    runs_dir: RunsDir = Path("runs"),
    nats_url: NatsUrl = None,
    start_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds until something must answer; a download counts.")
    ] = 60.0,
) -> None:
    """Start everything on this machine, and keep it running until Ctrl-C."""
    from lemix.running import run_command
    from lemix.topology import ClusterOptions
    from lemix.up import run_up

    options = ClusterOptions(
        name=name,
        runs_dir=runs_dir,
        nodes=nodes,
        stages=stages,
        devices=tuple(device or ["cpu"]),
        model=model,
        policy=policy,
        host=host,
        port=port,
        nats_url=nats_url,
        start_timeout_s=start_timeout,
    )
    run_command(run_up(options, Console(), SystemClock()))


@app.command()
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
    from lemix.demo import DemoOptions, run_demo
    from lemix.demo_data import DemoData
    from lemix.demo_view import DemoView, summary_table
    from lemix.running import run_command
    from shared.settings import LemixSettings, read_settings

    console = Console()
    options = DemoOptions(seconds=seconds, requests_per_s=rate)
    data = DemoData.load(
        num_batches=num_batches,
        run_id=f"demo-{secrets.token_hex(4)}",
        model=cluster.model or read_settings(LemixSettings).model,
    )
    with DemoView(console) as view:
        summary = run_command(run_demo(cluster, options, data, view, SystemClock()))
    if summary is None:
        return INTERRUPTED
    console.print(summary_table(summary))
    console.print(
        f"written to {cluster.run_dir / 'summary.json'}", markup=False, highlight=False, soft_wrap=True
    )
    for fault in summary.faults():
        _say_error(fault)
    return 1 if summary.faults() else 0


@train.command()
def publish(
    file: Annotated[Path, typer.Argument(help="One training batch a line, as JSON.")],
    nats_url: NatsUrl = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Publish training batches durably; a batch with an id that was published before is not stored again."""
    from lemix.publish_command import run_publish
    from lemix.running import run_command

    run_command(run_publish(file, nats_url, runs_dir, Console()))


@app.command()
def status(nats_url: NatsUrl = None, runs_dir: RunsDir = Path("runs")) -> None:
    """Show nodes, stages, weights versions and queues of the running cluster."""
    from lemix.running import run_command
    from lemix.status import run_status

    run_command(run_status(nats_url, runs_dir, Console()))


def _say_error(message: str) -> None:
    Console(stderr=True).print(f"error: {message}", markup=False, highlight=False, soft_wrap=True)


def _fail(message: str) -> NoReturn:
    _say_error(message)
    sys.exit(1)
