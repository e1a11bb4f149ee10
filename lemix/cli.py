"""The command `lemix`: its subcommands are in `commands`."""

import sys

import typer

from lemix.commands import cluster, lab, train, weights
from lemix.commands.errors import say_error
from shared.errors import LemixError

app = typer.Typer(
    help="Serve and train one language model on the same devices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (cluster.up, cluster.demo, lab.simulate, lab.study, lab.profile, cluster.status):
    app.command()(command)
app.add_typer(train.app, name="train")
app.add_typer(weights.app, name="weights")


def main() -> None:
    """Entry point: an expected error is one clear line and exit status 1, never a traceback."""
    try:
        app()
    except LemixError as error:
        say_error(str(error))
        sys.exit(1)
