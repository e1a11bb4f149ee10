"""`lemix keys`: who may use the HTTP API."""

from pathlib import Path
from typing import Annotated

import typer

from lemix.printing import Output
from lemix.run_choice import DEFAULT_RUN
from lemix.run_folder import check_run_name
from shared.clock import SystemClock
from shared.errors import ConfigurationError

app = typer.Typer(help="Keys of the HTTP API.", no_args_is_help=True)

Run = Annotated[
    str | None,
    typer.Option("--run", help="The run whose gateway reads the keys.", show_default=f"{DEFAULT_RUN}"),
]
KeysDir = Annotated[
    Path | None, typer.Option("--runs-dir", help="Where the files of runs lie.", show_default="runs")
]
PerMinute = Annotated[int | None, typer.Option(min=1, show_default="no limit")]


@app.command()
def create(
    name: Annotated[str, typer.Option(help="Whose key it is, for people.")],
    scope: Annotated[
        str, typer.Option(help="What it may do, separated by commas: infer, train, admin (everything).")
    ] = "infer",
    service_class: Annotated[
        str, typer.Option("--class", help="How soon it needs answers: interactive, or batch (after those).")
    ] = "interactive",
    requests_per_minute: PerMinute = None,
    tokens_per_minute: PerMinute = None,
    run: Run = None,
    runs_dir: KeysDir = None,
) -> None:
    """Make a key and show it, this once; once there is a key, nobody is let in without."""
    from lemix import keys_command
    from services.gateway.access.keys import SCOPES, SERVICE_CLASSES

    asked = scope.replace(" ", "").split(",")
    scopes = tuple(known for known in SCOPES if known in asked)
    if unknown := set(asked) - set(SCOPES):
        raise ConfigurationError(f"--scope {', '.join(sorted(unknown))!r} is none of {', '.join(SCOPES)}")
    known_class = next((known for known in SERVICE_CLASSES if known == service_class), None)
    if known_class is None:
        raise ConfigurationError(f"--class {service_class!r} is none of {', '.join(SERVICE_CLASSES)}")
    keys_command.create(
        _keys_file(run, runs_dir),
        name,
        scopes,
        service_class=known_class,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        clock=SystemClock(),
        console=Output(),
    )


@app.command(name="list")
def list_keys(run: Run = None, runs_dir: KeysDir = None) -> None:
    """Show the keys: their ids, names, scopes, classes and limits."""
    from lemix import keys_command

    keys_command.show(_keys_file(run, runs_dir), Output())


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `lemix keys list` shows it.")],
    run: Run = None,
    runs_dir: KeysDir = None,
) -> None:
    """Take a key back; a gateway that runs refuses it within a second."""
    from lemix import keys_command

    keys_command.revoke(_keys_file(run, runs_dir), key_id, Output())


def _keys_file(run: str | None, runs_dir: Path | None) -> Path:
    """The keys of the named run; else those that a gateway with this environment would read.

    Raises ConfigurationError when no run can have that name.
    """
    from services.gateway.settings import KEYS_FILE, GatewaySettings
    from shared.settings import read_settings

    if run is None and runs_dir is None:
        return read_settings(GatewaySettings).keys_path
    name = DEFAULT_RUN if run is None else run
    check_run_name(name)
    return (runs_dir or Path("runs")) / name / KEYS_FILE
