"""What the CPU proves with stand-ins, on a card: drawing in captured steps, copies of state, kernels."""

import pytest
import torch

from services.stage_worker.checkpoint.staging import CudaLane, StateCopies
from services.stage_worker.compute.attention.kernels import is_right, kernel_for
from services.stage_worker.compute.executor import Took
from services.stage_worker.compute.graphs import GraphCapture
from services.stage_worker.compute.kv_cache import PagedKVCache
from services.stage_worker.compute.memory import device_memory
from services.stage_worker.compute.op_timer import timer_for
from services.stage_worker.compute.sampling.draw import draw
from services.stage_worker.compute.sampling.sequences import SequenceState
from services.stage_worker.compute.sampling.step import Drawing, StepSampler
from services.stage_worker.compute.streams import streams_for
from shared.messages.inference import Sampling
from shared.model.attention import PackedSegments
from shared.model.varlen import varlen_for

DEVICE, DEADLINE_S = "cuda:0", 60.0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_draws_are_those_of_rows_that_run_as_they_come(dtype: torch.dtype) -> None:
    samplings = [
        Sampling(max_tokens=9, temperature=0.0),
        Sampling(max_tokens=9, seed=3),
        Sampling(max_tokens=9, temperature=0.7, top_p=0.8, seed=4),
        Sampling(max_tokens=9, temperature=1.4, top_k=50, min_p=0.01, seed=5),
    ]
    streams = streams_for(torch.device(DEVICE))
    with streams.changing():
        sampler = StepSampler(max_rows=4, vocab_size=32_000, dtype=dtype, device=DEVICE)
    with torch.inference_mode(), streams.serving():
        sampler.prepare(GraphCapture(torch.device(DEVICE)), [1, 2, 4])
        for index in range(8):
            logits = torch.randn(4, 32_000, device=DEVICE).mul_(3).to(dtype)
            for kinds in (samplings[:1], samplings[:2], samplings):
                sampler.logits_RV.copy_(logits)
                drawn = sampler.draw(len(kinds), [Drawing(one, index) for one in kinds]).wait()
                states = [SequenceState("g", one) for one in kinds]
                assert drawn == draw(logits[: len(kinds)], states, [index] * len(kinds))


def test_a_copy_of_the_state_is_as_it_was_when_the_copy_was_asked_for() -> None:
    weight = torch.arange(50_000_000, dtype=torch.float32, device=DEVICE)
    state = StateCopies(CudaLane(torch.device(DEVICE)))
    weight.add_(1)  # still running when the copy begins
    copying = state.start(lambda to_host: to_host(weight))
    state.settle()
    weight.zero_()
    copied = copying.result(DEADLINE_S)
    state.close()
    assert torch.equal(copied, torch.arange(50_000_000, dtype=torch.float32) + 1)


def test_the_time_of_an_op_is_the_devices_however_early_it_was_launched() -> None:
    factor, timer = torch.randn(8192, 8192, device=DEVICE), timer_for(torch.device(DEVICE))
    factor @ factor
    torch.cuda.synchronize()
    ends = []
    for num_products in (50, 50, 10):
        end = timer()
        for _ in range(num_products):
            factor @ factor
        ends.extend(end())
    assert not any(part.is_over() for part in ends), "they are launched only"
    first_s, second_s, short_s = (part.wait_s() for part in ends)
    assert torch.cuda.current_stream().query()
    assert second_s == pytest.approx(first_s, rel=0.3)
    assert short_s < 0.5 * second_s


def test_an_iteration_runs_beside_training_and_a_change_between_two_of_them() -> None:
    streams, timer = streams_for(torch.device(DEVICE)), timer_for(torch.device(DEVICE))
    size = 4096
    weights, inputs = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(weights)

    def iterate() -> Took:
        with streams.serving():
            end = timer()
            torch.mm(inputs, weights, out=out)
            return end()

    for part in iterate():  # libraries take their memory in the first
        part.wait_s()
    end = timer()
    for _ in range(400):
        inputs @ inputs
    (training,) = end()
    (beside,) = iterate()
    beside.wait_s()
    assert not training.is_over(), "the iteration did not wait for it"
    with streams.changing():
        weights.zero_()
    (behind,) = iterate()
    behind.wait_s()
    assert training.is_over()
    assert torch.count_nonzero(out).item() == 0


@pytest.mark.parametrize("block_size", [16, 256])
def test_a_kernel_that_is_installed_gives_the_right_numbers(block_size: int) -> None:
    cache = PagedKVCache(1, 4, block_size, 4, 128, torch.bfloat16, DEVICE)
    kernel = kernel_for(cache, 8, None)
    if kernel is None:
        pytest.skip("no kernel is installed for such blocks")
    assert is_right(kernel, cache, 8)


@pytest.mark.parametrize("sliding_window", [None, 7])
def test_packed_segments_in_one_launch_give_the_numbers_of_many(sliding_window: int | None) -> None:
    torch.manual_seed(1)
    lengths = (33, 5, 100)
    rows = [
        torch.randn(1, heads, sum(lengths), 64, device=DEVICE, dtype=torch.bfloat16) for heads in (8, 2, 2)
    ]
    if varlen_for(rows[0]) is None:
        pytest.skip("no such function is installed")
    wanted = {"scaling": 0.125, "sliding_window": sliding_window}
    found = PackedSegments(lengths).attend(0, *rows, **wanted)
    expected = PackedSegments(lengths).attend(0, *(each.float() for each in rows), **wanted)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.03)


def test_the_devices_memory_is_known() -> None:
    memory = device_memory(torch.device(DEVICE))
    assert memory is not None
    assert 0 < memory.free <= memory.total
