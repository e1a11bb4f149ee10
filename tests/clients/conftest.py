"""What the tests of clients share: clusters in a thread of their own, so that blocking clients may block."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

from shared.settings import EMBEDDED_MODEL
from tests.clients.ways import client_of
from tests.support.whole_cluster import whole_cluster


@pytest.fixture(scope="session")
def portal() -> Iterator[BlockingPortal]:
    """The event loop that clusters run in."""
    with start_blocking_portal() as portal:
        yield portal


@pytest.fixture(scope="session")
def address(portal: BlockingPortal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a gateway answers in front of one node of two stages with the embedded model."""
    cluster = whole_cluster(Path(EMBEDDED_MODEL), tmp_path_factory.mktemp("real"), num_stages=2)
    with portal.wrap_async_context_manager(cluster) as address:
        yield address


@pytest.fixture(scope="session")
def client(address: str) -> Iterator[openai.OpenAI]:
    """The official client of that cluster."""
    with client_of(address) as client:
        yield client
