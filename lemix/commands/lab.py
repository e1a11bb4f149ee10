"""`lemix simulate`, `study` and `profile`: measuring and predicting."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from lemix.commands.options import Model, NodeProfile, Nodes, RunsDir, Stages
from lemix.printing import Output
from lemix.simulation.workload import Arrivals, Order, Release
from shared.clock import SystemClock
from shared.schedule import ScheduleName

DEFAULT_RATE_PER_S = 16.0
"""Requests of a simulation."""


def simulate(
    profile: Annotated[str, typer.Option(help="MODEL@DEVICE, or a file that `lemix profile` wrote.")],
    nodes: Nodes = 4,
    stages: Annotated[
        int | None, typer.Option(min=1, help="Pipeline stages of each node.", show_default="the profile's")
    ] = None,
    node_profile: NodeProfile = None,
    at: Annotated[
        list[str] | None,
        typer.Option(
            help="'60 s: fail 2', and in the same way join, leave, or slow NODE FACTOR; can be repeated.",
            show_default="nothing happens",
        ),
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
    device_noise: Annotated[
        float, typer.Option(min=0, help="Spread of each op's time: 0.05 for 5 % of it.")
    ] = 0.0,
    device_bias: Annotated[
        float, typer.Option(min=0, help="Spread of how far devices are off the profile, by sizes of ops.")
    ] = 0.0,
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
    from lemix.lab_extra import check_lab

    check_lab()
    from lemix.node_profiles import profiles_by_node
    from lemix.simulation.cluster import SimulationOptions
    from lemix.simulation.command import run_simulate
    from lemix.simulation.node_events import node_event
    from lemix.simulation.trace import read_trace
    from lemix.simulation.workload import WorkloadOptions
    from services.scheduler.objectives import Objectives

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
            device_noise=device_noise,
            device_bias=device_bias,
            objectives=Objectives(slo_factor=slo_factor),
            node_profiles=profiles_by_node(node_profile or ()),
            events=tuple(map(node_event, at or ())),
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
        console=Output(),
    )


def study(
    name: Annotated[
        str,
        typer.Argument(
            help="frontier, overload, unlike, failures, trace, main, heterogeneity, ablation, busy-parts,"
            " sensitivity, synchronous, generation, data-parallel, learning, live."
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
    trace: Annotated[
        Path | None, typer.Option(help="CSV file of recorded requests, for the study `trace`.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where tables and figures go.", show_default="docs/studies")
    ] = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Make the runs of a study, those that are not there yet, and write its tables and figures."""
    from lemix.lab_extra import check_lab

    check_lab()
    from lemix.studies.command import StudyOptions, run_study

    options = StudyOptions(
        name=name,
        quick=quick,
        fresh=fresh,
        policies=tuple(policies.split(",")) if policies else (),
        workers=workers,
        output=output,
        runs_dir=runs_dir,
        trace=trace,
    )
    run_study(options, Output())


def plan(
    profile: Annotated[str, typer.Option(help="MODEL@DEVICE, or a file that `lemix profile` wrote.")],
    rate: Annotated[float, typer.Option(help="Requests per second.")],
    training: Annotated[float, typer.Option(help="Training tokens per second.")] = 0.0,
    slo: Annotated[
        float | None,
        typer.Option(help="Milliseconds to the first token.", show_default="5 forwards of the prompt"),
    ] = None,
    tbt: Annotated[
        float | None, typer.Option(help="Milliseconds between tokens, p99.", show_default="none")
    ] = None,
    in_time: Annotated[float, typer.Option(help="Share of the requests.")] = 0.99,
    max_tokens: Annotated[
        tuple[int, int], typer.Option(help="Generated for each request: lowest, highest.")
    ] = (1, 1),
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences of a training batch.")] = 1,
    trace: Annotated[Path | None, typer.Option(help="CSV file of requests whose lengths yours have.")] = None,
    policy: Annotated[str, typer.Option(help="The scheduler's policy.")] = "lemix",
    device_noise: Annotated[
        float, typer.Option(min=0, help="Spread of each op's time: 0.05 for 5 % of it.")
    ] = 0.05,
    requests: Annotated[int, typer.Option(min=1, help="In each simulated run.")] = 600,
    most_nodes: Annotated[int, typer.Option(min=1, help="Tried at most.")] = 32,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Runs at the same time.", show_default="as many as cores")
    ] = None,
) -> None:
    """Say how many nodes a load needs, with the margin, by simulating it on more and more of them."""
    from lemix.simulation.trace import read_trace
    from lemix.studies.demand import Demand
    from lemix.studies.planning import PlanOptions, run_plan
    from services.scheduler.objectives import Objectives

    run_plan(
        PlanOptions(
            demand=Demand(
                profile=profile,
                rate_per_s=rate,
                training_tokens_per_s=training,
                batch_size=batch_size,
                max_tokens=max_tokens,
                tbt_p99_s=None if tbt is None else tbt / 1000,
                num_requests=requests,
                trace=read_trace(trace, limit=requests) if trace is not None else (),
                objectives=Objectives(ttft_s=None if slo is None else slo / 1000),
                cluster={"device_noise": device_noise},
            ),
            in_time=in_time,
            policy=policy,
            most_nodes=most_nodes,
            workers=workers,
        ),
        Output(),
    )


def profile(
    output: Annotated[Path, typer.Option(help="The profile's file, JSON.")] = Path("profile.json"),
    stages: Stages = 2,
    model: Model = None,
    device: Annotated[str, typer.Option(help="cpu or cuda:N, for each stage in turn.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="A few points only, to try it out.")] = False,
) -> None:
    """Measure a model's stages on a device, for forecasts and for emulation."""
    from lemix.devices import check_devices
    from lemix.preflight import check_model
    from lemix.running import run_command
    from shared.settings import LemixSettings, read_settings

    model = model or read_settings(LemixSettings).model
    check_devices([device])
    check_model(model, stages)
    from lemix.profiling.command import ProfileOptions, run_profile  # takes seconds: it loads torch

    options = ProfileOptions(
        model=model,
        stages=stages,
        device=device,
        output=output,
        is_quick=quick,
    )
    run_command(run_profile(options, Output(), SystemClock()))
