"""A node of one stage on the card, with `large` loaded."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks.models import DTYPES, model_folder
from lemix.launcher import LocalCluster
from lemix.run_folder import clear
from lemix.topology import ClusterOptions

MODEL = "large"


def model(work: Path, device: str) -> Path:
    """Its folder, made at first use."""
    return model_folder(MODEL, work / "models", device)


@asynccontextmanager
async def large_node(
    name: str, work: Path, device: str, settings: Mapping[str, str], *, stages: int = 1
) -> AsyncIterator[LocalCluster]:
    """Ready; ended on exit. `settings`: of every service."""
    options = ClusterOptions(
        name=name,
        runs_dir=work,
        nodes=1,
        stages=stages,
        devices=(device,),
        model=str(model(work, device)),
        # A fixed cache: what else is measured on the card needs memory, too.
        extra_env={
            "LEMIX_DTYPE": DTYPES[MODEL],
            "LEMIX_KV_TOKENS": "16384",
            "LEMIX_GUARD_SAMPLES": "0",
            **settings,
        },
    )
    clear(options.run_dir)
    async with LocalCluster(options) as cluster:
        yield cluster
