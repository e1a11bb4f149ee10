"""`lemix lineage`: what a version has learnt."""

from pathlib import Path
from typing import Annotated

import typer

from lemix.commands.options import NatsUrl, Node, RunName, RunsDir, Version
from lemix.printing import Output, say
from lemix.run_choice import checkpoint_root, find_if_running


def lineage(
    version: Version,
    node: Node = None,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
    nats_url: NatsUrl = None,
    runs_dir: RunsDir = Path("runs"),
    name: RunName = None,
) -> None:
    """Show which batches a durable version has learnt, and from whom; the newest last."""
    from lemix.lineage_command import WholeLineage, fetch_lineage, json_of, read_lineage, show_lineage
    from lemix.running import run_command

    target = find_if_running(nats_url, runs_dir, name)
    found: WholeLineage | None
    if target is None:
        root = checkpoint_root(runs_dir, name)
        found, label = read_lineage(root, version, node), f"run {root.parent.name}, not running"
    else:
        found, label = run_command(fetch_lineage(target, version, node)), target.label
    if found is None:  # interrupted
        return
    if as_json:
        say(Output(), json_of(found))
    else:
        show_lineage(found, label, Output())
