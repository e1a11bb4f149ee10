"""Training by a node of one stage, against a plain loop and the card's rate of matrix products."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from benchmarks import training
from benchmarks.gpu.bounds import matrix_flops_per_s
from benchmarks.gpu.node import MODEL, model
from benchmarks.models import num_weights


async def main(work: Path, device: str) -> AsyncIterator[dict[str, Any]]:
    """Six operations for each weight and token: two of the forward, four of the backward."""
    flops_per_s = matrix_flops_per_s(device)
    folder = model(work, device)
    measured = await training.measure(MODEL, work, device)
    share = 6 * num_weights(folder) * measured["lemix"]["median"] / flops_per_s
    yield {**measured, "matrix_flops_per_s": flops_per_s, "share_of_matrix_rate": share}
