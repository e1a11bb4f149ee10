"""`lemix weights`: versions of the weights."""

from pathlib import Path
from typing import Annotated

import typer

from lemix.commands.options import NatsUrl, Node, RunName, RunsDir, Version
from lemix.printing import Output
from lemix.run_choice import checkpoint_root, find_if_running, find_running
from shared.clock import SystemClock

app = typer.Typer(help="Versions of the weights.", no_args_is_help=True)


@app.command(name="list")
def list_versions(nats_url: NatsUrl = None, runs_dir: RunsDir = Path("runs"), name: RunName = None) -> None:
    """Show the durable versions of each node, and which one is served."""
    from lemix.running import run_command
    from lemix.weights_command import list_folder, run_list

    now_wall_s = SystemClock().wall_s()
    target = find_if_running(nats_url, runs_dir, name)
    if target is None:
        list_folder(checkpoint_root(runs_dir, name), Output(), now_wall_s)
    else:
        run_command(run_list(target, Output(), now_wall_s))


@app.command()
def rollback(
    version: Version,
    node: Node = None,
    nats_url: NatsUrl = None,
    runs_dir: RunsDir = Path("runs"),
    name: RunName = None,
) -> None:
    """Go back to an older version, live; 0 is the model as it was given.

    The batches that only newer versions contain are discarded.
    """
    from lemix.running import run_command
    from lemix.weights_command import run_rollback

    run_command(run_rollback(version, node, find_running(nats_url, runs_dir, name), Output()))


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

    run_export(version, folder, node, checkpoint_root(runs_dir, name), Output())
