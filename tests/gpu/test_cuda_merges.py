"""Two nodes whose stages share one GPU become one, against plain loops on the same GPU."""

from pathlib import Path

import pytest
import torch

from tests.integration.test_pipeline_merges import check_a_merge, check_steps_on_the_mean

DEVICE = "cuda:0"
ROUNDING = 10.0
"""A GPU adds up the gradient of an embedding in any order."""

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


async def test_a_merge_is_the_mean_of_what_nodes_have_learnt_apart(tmp_path: Path) -> None:
    await check_a_merge("llama_tied", tmp_path, device=DEVICE, rounding=ROUNDING)


async def test_steps_on_the_mean_of_gradients_equal_one_process(tmp_path: Path) -> None:
    await check_steps_on_the_mean("llama_tied", tmp_path, device=DEVICE, rounding=ROUNDING)
