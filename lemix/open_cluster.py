"""A cluster whose NATS server lets everybody in: for measurements, which play several roles at once."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

from lemix.launcher import LocalCluster, ignore
from lemix.nats_server import NatsServer
from lemix.topology import ClusterOptions


@asynccontextmanager
async def open_cluster(
    options: ClusterOptions, *, on_event: Callable[[str], None] = ignore
) -> AsyncIterator[LocalCluster]:
    """A running cluster. Raises what `LocalCluster.start` raises."""
    async with (
        NatsServer(options.run_dir / "nats") as server,
        LocalCluster(replace(options, nats_url=server.url), on_event=on_event) as cluster,
    ):
        yield cluster
