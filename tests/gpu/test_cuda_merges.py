"""Two nodes whose stages share one GPU become one, against plain loops on the same GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration import test_pipeline_merges as merges

ON_GPU: dict[str, Any] = {"device": "cuda:0"}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


async def test_a_merge_is_the_mean_of_what_nodes_have_learnt_apart(tmp_path: Path) -> None:
    await merges.test_a_merge_is_the_mean_of_what_nodes_have_learnt_apart("llama_tied", ON_GPU, tmp_path)


async def test_steps_on_the_mean_of_gradients_equal_one_process(tmp_path: Path) -> None:
    await merges.test_steps_on_the_mean_of_gradients_equal_one_process("llama_tied", ON_GPU, tmp_path)
