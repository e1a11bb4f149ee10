"""What these tests share: two clusters in a process of their own, and the official client of each."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping

import openai
import pytest

from tests.clients.ways import client_of

# Before LiteLLM is imported: else it asks the internet for prices.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")


@pytest.fixture(scope="session")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """Where the clusters answer."""
    command = [sys.executable, "-m", "tests.clients.clusters", str(tmp_path_factory.mktemp("clusters"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())


@pytest.fixture(scope="session")
def address(addresses: Mapping[str, str]) -> str:
    """A gateway in front of one node of two stages with the embedded model."""
    return addresses["real"]


@pytest.fixture(scope="session")
def client(address: str) -> Iterator[openai.OpenAI]:
    """The official client of that cluster."""
    with client_of(address) as client:
        yield client


@pytest.fixture(scope="session")
def weather_address(addresses: Mapping[str, str]) -> str:
    """A gateway whose model calls a tool and says exact texts."""
    return addresses["weather"]


@pytest.fixture(scope="session")
def weather_client(weather_address: str) -> Iterator[openai.OpenAI]:
    """The official client of that gateway."""
    with client_of(weather_address) as client:
        yield client
