"""The limits of the card itself: the bounds that results are held against, measured in the same run."""

import time
from collections.abc import Callable

import torch

NUM_REPEATS = 10
NUM_BYTES_READ = 4 << 30
MATRIX_SIZE = 8192


def read_bytes_per_s(device: str) -> float:
    """Bandwidth at which memory is read: the sum of 4 GiB of bfloat16."""
    values = torch.zeros(NUM_BYTES_READ // 2, dtype=torch.bfloat16, device=device)
    return NUM_BYTES_READ / _seconds(device, values.sum)


def matrix_flops_per_s(device: str) -> float:
    """Rate of a large bfloat16 matrix product of random numbers; an addition and a product count as two."""
    one, other = (
        torch.randn(MATRIX_SIZE, MATRIX_SIZE, dtype=torch.bfloat16, device=device) for _ in range(2)
    )
    return 2 * MATRIX_SIZE**3 / _seconds(device, lambda: one @ other)


def _seconds(device: str, work: Callable[[], object]) -> float:
    """The time of one call, after three that warm up."""
    for _ in range(3):
        work()
    torch.cuda.synchronize(device)
    start_s = time.perf_counter()
    for _ in range(NUM_REPEATS):
        work()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - start_s) / NUM_REPEATS
