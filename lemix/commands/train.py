"""`lemix train`: training batches."""

import secrets
import sys
from pathlib import Path
from typing import Annotated

import typer

from lemix.commands.options import NatsUrl, RunName, RunsDir
from lemix.printing import Output
from lemix.run_choice import find_running
from shared.examples import MAX_EXAMPLES

NOT_SERVED = 3
"""Exit status: trained, and not served."""

app = typer.Typer(help="Training batches.", no_args_is_help=True)


@app.command()
def publish(
    file: Annotated[
        Path, typer.Argument(help="One batch or one example a line, as JSON; - is standard input.")
    ],
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, max=MAX_EXAMPLES, help="Examples a batch, of a file of examples.", show_default="8"
        ),
    ] = None,
    epochs: Annotated[
        int, typer.Option(min=1, help="How many times all of it is trained; examples change their order.")
    ] = 1,
    follow: Annotated[
        bool, typer.Option("--follow", help="Wait until it is trained, and show the loss.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Train it again, although it was trained or rolled back before.")
    ] = False,
    producer: Annotated[
        str | None,
        typer.Option(
            help="Who publishes it, for `lemix lineage`; a batch may name its own.",
            show_default="user@host",
        ),
    ] = None,
    nats_url: NatsUrl = None,
    runs_dir: RunsDir = Path("runs"),
    name: RunName = None,
) -> None:
    """Publish training batches durably; one whose id was published before is not trained again.

    With --follow, the exit status is 3 when what was learnt is not served: a guard withholds it, or has not
    judged it yet.
    """
    from lemix.publish_command import run_publish
    from lemix.publishing import read_batches, signed, this_person
    from lemix.running import run_command

    salt = secrets.token_hex(4) if again else ""
    batches = read_batches(file, batch_size, epochs=epochs, salt=salt)
    batches = signed(batches, this_person() if producer is None else producer)
    target = find_running(nats_url, runs_dir, name)
    if run_command(run_publish(batches, target, Output(), follows=follow)) is False:
        raise typer.Exit(NOT_SERVED)


@app.command()
def rejected(
    sequence: Annotated[
        int | None,
        typer.Argument(help="Write the batch at this place of the stream to standard output, as published."),
    ] = None,
    nats_url: NatsUrl = None,
    runs_dir: RunsDir = Path("runs"),
    name: RunName = None,
) -> None:
    """Show the training batches that were rejected, and why."""
    from lemix.rejected_command import fetch_rejected, run_rejected
    from lemix.running import run_command

    target = find_running(nats_url, runs_dir, name)
    if sequence is None:
        run_command(run_rejected(target, Output()))
    elif (content := run_command(fetch_rejected(target, sequence))) is not None:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
