"""The time of an op on a device, which is not that of its launch."""

import pytest
import torch

from services.stage_worker.compute.op_timer import CudaTimer, call_timer, timer_for
from tests.support.played_cuda import PlayedCuda

DEVICE = torch.device("cuda:0")


def test_an_op_takes_as_long_as_the_device_works_on_it_however_early_it_was_launched() -> None:
    cuda = PlayedCuda()
    timer = CudaTimer(DEVICE, cuda)
    cuda.launch("before", 40.0)
    end_first = timer()
    cuda.launch("first", 5.0)
    (first,) = end_first()
    end_second = timer()
    cuda.launch("second", 7.0)
    (second,) = end_second()
    assert (first.is_over(), second.is_over()) == (False, False)
    assert (first.wait_s(), second.wait_s()) == pytest.approx((0.005, 0.007))
    assert (first.is_over(), second.is_over(), cuda.now_ms) == (True, True, 52.0)


def test_the_time_of_a_device_that_waits_for_the_host_is_part_of_the_op() -> None:
    cuda = PlayedCuda()
    end = CudaTimer(DEVICE, cuda)()
    cuda.now_ms += 3.0  # of launching
    cuda.launch("op", 2.0)
    (time,) = end()
    assert time.wait_s() == pytest.approx(0.005)


def test_on_a_cpu_the_call_is_the_op() -> None:
    assert timer_for(torch.device("cpu")) is call_timer
    assert call_timer()() == ()
