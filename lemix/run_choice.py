"""Which run a command speaks to: the one that is named, or the only one that is running."""

from dataclasses import dataclass
from pathlib import Path

from lemix.run_folder import ClusterFile, check_run_name, running_clusters
from shared.addresses import nats_address
from shared.errors import ConfigurationError
from shared.settings import LemixSettings, read_settings

DEFAULT_RUN = "default"


@dataclass(frozen=True, slots=True)
class Target:
    """A running cluster."""

    nats_url: str
    label: str
    """How it is named to people: `run default`."""
    nats_users: Path | None = None
    """The folder of its server's users; None: the server lets everybody in."""


def find_running(nats_url: str | None, runs_dir: Path, name: str | None) -> Target:
    """The cluster of the server at `nats_url`, of the run `name`, or of the only run that is running.

    Raises ConfigurationError when there is none, when several are running and none is named, or when both a
    server and a run are given.
    """
    found = find_if_running(nats_url, runs_dir, name)
    if found is not None:
        return found
    if name is not None:
        others = ", ".join(running_clusters(runs_dir)) or "none"
        raise ConfigurationError(f"run {name!r} is not running under {runs_dir}/; those that are: {others}")
    raise ConfigurationError(
        f"no LeMix is running under {runs_dir}/; start one with `lemix up`, or set LEMIX_NATS_URL"
    )


def find_if_running(nats_url: str | None, runs_dir: Path, name: str | None) -> Target | None:
    """As `find_running`, but None when the run is not running, or none is."""
    if nats_url:
        place = nats_address(nats_url)
        if name is not None:
            raise ConfigurationError(
                f"give either a server (--nats-url or LEMIX_NATS_URL: {place}) or a run (--name {name})"
            )
        return Target(nats_url, f"the cluster at {place}", read_settings(LemixSettings).nats_users)
    chosen = _chosen(runs_dir, name)
    if chosen is None:
        return None
    chosen_name, cluster = chosen
    return Target(cluster.nats_url, f"run {chosen_name}", cluster.nats_users)


def checkpoint_root(runs_dir: Path, name: str | None) -> Path:
    """The folder of the checkpoints of run `name`, of the only run that is running, or of the default run.

    Raises ConfigurationError when several are running and none is named, or the run has no folder.
    """
    chosen = _chosen(runs_dir, name)
    run_dir = runs_dir / (chosen[0] if chosen else name or DEFAULT_RUN)
    if not run_dir.is_dir():
        raise ConfigurationError(f"there is no run {run_dir.name!r} under {runs_dir}/")
    return run_dir / "checkpoints"


def _chosen(runs_dir: Path, name: str | None) -> tuple[str, ClusterFile] | None:
    """The running cluster of that name, or the only one. Raises ConfigurationError."""
    if name is not None:
        check_run_name(name)
    running = running_clusters(runs_dir)
    if name is None and len(running) > 1:
        each = ", ".join(f"{other} ({cluster.api_url})" for other, cluster in running.items())
        raise ConfigurationError(
            f"{len(running)} runs are running under {runs_dir}/: {each}; choose one with --name"
        )
    wanted = next(iter(running), None) if name is None else name
    return (wanted, running[wanted]) if wanted in running else None
