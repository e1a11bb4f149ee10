"""The command `lemix`. What takes long to import is imported by the command that needs it."""

import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer
from rich.console import Console

from lemix.simulation.workload import Arrivals, Order, Release
from shared.clock import SystemClock
from shared.errors import LemixError
from shared.schedule import ScheduleName

if TYPE_CHECKING:
    from lemix.topology import ClusterOptions

INTERRUPTED = 130
DEFAULT_RATE_PER_S = 16.0
"""Requests of a simulation."""

app = typer.Typer(
    help="Serve and train one language model on the same devices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
train = typer.Typer(help="Training batches.", no_args_is_help=True)
app.add_typer(train, name="train")
weights = typer.Typer(help="Versions of the weights.", no_args_is_help=True)
app.add_typer(weights, name="weights")

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
    typer.Option(help="The scheduler's policy.", envvar="LEMIX_POLICY", show_default="lemix"),
]
Device = Annotated[
    list[str] | None,
    typer.Option(help="cpu or cuda:N; repeat it to deal several out to the stages.", show_default="cpu"),
]
Emulate = Annotated[
    str | None,
    typer.Option(
        help="Compute nothing: stages take as long as this profile says (MODEL@DEVICE, or a file).",
        show_default="compute",
    ),
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Of the HTTP API; 0 takes a free one.")]
NatsUrl = Annotated[
    str | None,
    typer.Option(
        help="A running NATS server with JetStream.", envvar="LEMIX_NATS_URL", show_default="one of its own"
    ),
]
RunsDir = Annotated[Path, typer.Option(help="Where the files of runs lie.")]
RunName = Annotated[
    str | None,
    typer.Option("--name", help="A run's name.", show_default="the run that is running, or default"),
]
Version = Annotated[int, typer.Argument(min=0, help="As `lemix weights list` shows it.")]
Node = Annotated[int | None, typer.Option(min=0, help="Of this node only.", show_default="all nodes")]


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
    emulate: Emulate = None,
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
        emulate=emulate,
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


@app.command()
def simulate(
    profile: Annotated[str, typer.Option(help="MODEL@DEVICE, or a file that `lemix profile` wrote.")],
    nodes: Nodes = 4,
    stages: Annotated[
        int | None, typer.Option(min=1, help="Pipeline stages of each node.", show_default="the profile's")
    ] = None,
    policy: Annotated[str, typer.Option(help="The scheduler's policy.")] = "lemix",
    schedule: Annotated[ScheduleName, typer.Option(help="Whether batches overlap in a pipeline.")] = "async",
    discipline: Annotated[
        Literal["slo_first", "fifo"], typer.Option(help="What a stage takes first.")
    ] = "slo_first",
    costs: Annotated[
        Literal["affine", "quadratic"], typer.Option(help="The scheduler's cost model.")
    ] = "affine",
    hop_ms: Annotated[float, typer.Option(min=0, help="What a message takes.")] = 0.5,
    slo_factor: Annotated[
        float, typer.Option(min=0, help="The objective, in forward times of the model.")
    ] = 5.0,
    tasks: Annotated[int, typer.Option(min=1, help="Requests and training batches together.")] = 334,
    training_rate: Annotated[float, typer.Option(min=0, max=1, help="Share of tasks that train.")] = 0.5,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second.", show_default="16, or the trace's own")
    ] = None,
    arrivals: Annotated[Arrivals, typer.Option(help="Of requests.")] = "poisson",
    trace: Annotated[Path | None, typer.Option(help="CSV file of requests to replay instead.")] = None,
    order: Annotated[Order, typer.Option(help="Of task lengths in time.")] = "random",
    sigma: Annotated[
        float | None, typer.Option(min=0, help="Spread of task lengths (tokens).", show_default="as drawn")
    ] = None,
    max_tokens: Annotated[
        tuple[int, int], typer.Option(help="Generated for each sequence: lowest, highest.")
    ] = (1, 1),
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences of a training batch.")] = 1,
    request_size: Annotated[int, typer.Option(min=1, help="Sequences of a request.")] = 1,
    release: Annotated[Release, typer.Option(help="Of training batches.")] = "closed",
    training_per_s: Annotated[
        float | None, typer.Option(help="Training batches per second of release poisson.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same run.")] = 0,
    output: Annotated[Path, typer.Option(help="Where the run's files go.")] = Path("runs/simulate"),
    window: Annotated[
        tuple[float, float] | None,
        typer.Option(help="The picture's first and last second.", show_default="all"),
    ] = None,
) -> None:
    """Serve and train in virtual time on emulated devices, and show how well that went."""
    from lemix.simulation.cluster import SimulationOptions
    from lemix.simulation.command import run_simulate
    from lemix.simulation.trace import read_trace
    from lemix.simulation.workload import WorkloadOptions

    is_drawn = trace is None and arrivals == "poisson"
    run_simulate(
        SimulationOptions(
            nodes=nodes,
            stages=stages,
            profile=profile,
            policy=policy,
            schedule=schedule,
            discipline=discipline,
            costs=costs,
            seed=seed,
            hop_s=hop_ms / 1000,
            slo_factor=slo_factor,
        ),
        WorkloadOptions(
            num_tasks=tasks,
            training_rate=training_rate,
            arrivals=arrivals,
            rate_per_s=DEFAULT_RATE_PER_S if rate is None and is_drawn else rate,
            trace=read_trace(trace, limit=tasks) if trace is not None else (),
            batch_size=batch_size,
            request_size=request_size,
            order=order,
            sigma=sigma,
            max_tokens=max_tokens,
            release=release,
            training_per_s=training_per_s,
        ),
        folder=output,
        window=window,
        console=Console(),
    )


@app.command()
def study(
    name: Annotated[
        str,
        typer.Argument(
            help="main, heterogeneity, ablation, sensitivity, synchronous, generation, data-parallel, live."
        ),
    ],
    quick: Annotated[
        bool, typer.Option("--quick", help="A few short runs, written under the runs' folder.")
    ] = False,
    policies: Annotated[
        str | None, typer.Option(help="Make runs of these only, separated by commas.", show_default="all")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Runs at the same time.", show_default="as many as cores")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Make runs again that are there already.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Where tables and figures go.", show_default="docs/studies")
    ] = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Make the runs of a study, those that are not there yet, and write its tables and figures."""
    from lemix.studies.command import StudyOptions, run_study

    options = StudyOptions(
        name=name,
        quick=quick,
        fresh=fresh,
        policies=tuple(policies.split(",")) if policies else (),
        workers=workers,
        output=output,
        runs_dir=runs_dir,
    )
    run_study(options, Console())


@app.command()
def profile(
    output: Annotated[Path, typer.Option(help="The profile's file, JSON.")] = Path("profile.json"),
    stages: Stages = 2,
    model: Model = None,
    device: Annotated[str, typer.Option(help="cpu or cuda:N, for each stage in turn.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="A few points only, to try it out.")] = False,
) -> None:
    """Measure a model's stages on a device, for forecasts and for emulation."""
    from lemix.profiling.command import ProfileOptions, run_profile
    from lemix.running import run_command
    from shared.settings import LemixSettings, read_settings

    options = ProfileOptions(
        model=model or read_settings(LemixSettings).model,
        stages=stages,
        device=device,
        output=output,
        is_quick=quick,
    )
    run_command(run_profile(options, Console(), SystemClock()))


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


@train.command()
def rejected(
    sequence: Annotated[
        int | None,
        typer.Argument(help="Write the batch at this place of the stream to standard output, as published."),
    ] = None,
    nats_url: NatsUrl = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Show the training batches that were rejected, and why."""
    from lemix.rejected_command import run_rejected
    from lemix.running import run_command

    run_command(run_rejected(sequence, nats_url, runs_dir, Console()))


@app.command()
def status(nats_url: NatsUrl = None, runs_dir: RunsDir = Path("runs")) -> None:
    """Show nodes, stages, weights versions and queues of the running cluster."""
    from lemix.running import run_command
    from lemix.status import run_status

    run_command(run_status(nats_url, runs_dir, Console()))


@weights.command(name="list")
def list_versions(nats_url: NatsUrl = None, runs_dir: RunsDir = Path("runs"), name: RunName = None) -> None:
    """Show the durable versions of each node, and which one is served."""
    from lemix.running import run_command
    from lemix.weights_command import run_list

    run_command(run_list(nats_url, runs_dir, name, Console()))


@weights.command()
def rollback(
    version: Version, node: Node = None, nats_url: NatsUrl = None, runs_dir: RunsDir = Path("runs")
) -> None:
    """Go back to an older version, live; the batches that only newer ones contain are discarded."""
    from lemix.running import run_command
    from lemix.weights_command import run_rollback

    run_command(run_rollback(version, node, nats_url, runs_dir, Console()))


@weights.command()
def export(
    version: Version,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    node: Node = None,
    runs_dir: RunsDir = Path("runs"),
    name: RunName = None,
) -> None:
    """Write a version as a folder that `transformers` loads."""
    from lemix.weights_command import run_export

    run_export(version, folder, node, runs_dir, name, Console())


def _say_error(message: str) -> None:
    Console(stderr=True).print(f"error: {message}", markup=False, highlight=False, soft_wrap=True)


def _fail(message: str) -> NoReturn:
    _say_error(message)
    sys.exit(1)
