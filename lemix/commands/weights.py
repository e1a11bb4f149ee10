"""`lemix weights`: versions of the weights."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lemix.commands.options import NatsUrl, Node, RunName, RunsDir, Version

app = typer.Typer(help="Versions of the weights.", no_args_is_help=True)


@app.command(name="list")
def list_versions(nats_url: NatsUrl = None, runs_dir: RunsDir = Path("runs"), name: RunName = None) -> None:
    """Show the durable versions of each node, and which one is served."""
    from lemix.running import run_command
    from lemix.weights_command import run_list

    run_command(run_list(nats_url, runs_dir, name, Console()))


@app.command()
def rollback(
    version: Version, node: Node = None, nats_url: NatsUrl = None, runs_dir: RunsDir = Path("runs")
) -> None:
    """Go back to an older version, live; the batches that only newer ones contain are discarded."""
    from lemix.running import run_command
    from lemix.weights_command import run_rollback

    run_command(run_rollback(version, node, nats_url, runs_dir, Console()))


@app.command()
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
