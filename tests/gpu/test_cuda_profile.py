"""`lemix profile` on a CUDA device: times and the peak of its memory."""

from pathlib import Path

import pytest
import torch

from lemix.profiling.command import ProfileOptions, measured_profile
from shared.clock import SystemClock
from tests.support.models import NUM_LAYERS, save_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


async def test_a_forward_s_peak_is_measured(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    options = ProfileOptions(
        model=str(tmp_path / "model"), stages=2, device="cuda:0", output=tmp_path / "unused", is_quick=True
    )
    profile = await measured_profile(options, SystemClock())
    inputs_bytes = 4 * model.config.hidden_size * NUM_LAYERS // 2
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    for stage in profile.stages:
        assert stage.memory.activation_bytes_per_token > inputs_bytes
        assert stage.memory.capacity_bytes < total_bytes
        assert stage.step_s > 0
