"""The command `lemix`: its subcommands are in `commands`."""

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from lemix.commands import cluster, keys, lab, lineage, train, weights
from lemix.printing import Output, ReaderGoneError, say, say_error
from shared.errors import LemixError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (cluster.up, cluster.demo, lab.simulate, lab.study, lab.plan, lab.profile, cluster.status):
    app.command()(command)
app.command()(lineage.lineage)
app.add_typer(train.app, name="train")
app.add_typer(weights.app, name="weights")
app.add_typer(keys.app, name="keys")


def _show_version(wanted: bool) -> None:
    if wanted:
        say(Output(), f"lemix {version('lemix')}")
        raise typer.Exit


@app.callback()
def of_all_commands(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Serve and train one language model on the same devices."""


def main() -> None:
    """Entry point: an expected error is one clear line and exit status 1, never a traceback."""
    try:
        app()
    except ReaderGoneError:
        sys.exit(1)
    except LemixError as error:
        say_error(str(error))
        sys.exit(1)
