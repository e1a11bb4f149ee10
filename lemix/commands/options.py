"""Options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

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
NodeProfile = Annotated[
    list[str] | None,
    typer.Option(
        help="NODE=PROFILE or FIRST-LAST=PROFILE: other devices there; can be repeated.",
        show_default="all alike",
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
    typer.Option("--name", help="A run's name.", show_default="the only run that is running"),
]
Version = Annotated[int, typer.Argument(min=0, help="As `lemix weights list` shows it.")]
Node = Annotated[int | None, typer.Option(min=0, help="Of this node only.", show_default="all nodes")]
