"""`lemix train`: training batches."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lemix.commands.options import NatsUrl, RunsDir

app = typer.Typer(help="Training batches.", no_args_is_help=True)


@app.command()
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
