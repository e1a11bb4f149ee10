"""Whether the devices that a run asks for are there, told without loading torch."""

import ctypes
import os
import re
from collections.abc import Callable, Iterable
from importlib.metadata import version

from shared.errors import ConfigurationError

_CUDA = re.compile(r"cuda(?::(\d+))?")
_WITHOUT_CUDA = "+cpu"
_OTHER_DRIVER = "+rocm"
"""How the versions of PyTorch's builds end; ROCm's devices are called cuda, too."""


def num_cpu_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_cuda_devices() -> int:
    """As the driver counts them (CUDA_VISIBLE_DEVICES is heeded); 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def cuda_memory_bytes(index: int) -> int | None:
    """The whole memory of a GPU, as the driver counts GPUs; None without that GPU."""
    if index >= num_cuda_devices():
        return None
    driver, device, size = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0), ctypes.c_size_t(0)
    got = driver.cuDeviceGet(ctypes.byref(device), index) == 0
    return size.value if got and driver.cuDeviceTotalMem_v2(ctypes.byref(size), device) == 0 else None


def check_devices(
    devices: Iterable[str],
    *,
    torch_version: str | None = None,
    count: Callable[[], int] = num_cuda_devices,
) -> None:
    """Raises ConfigurationError, naming the first device that is wrong or not there.

    `torch_version`: of the PyTorch that will use them; None: the one that is installed.
    """
    for device in dict.fromkeys(devices):
        if device == "cpu":
            continue
        cuda = _CUDA.fullmatch(device)
        if cuda is None:
            raise ConfigurationError(f"device {device!r} is neither cpu nor cuda:N")
        _check_cuda(device, int(cuda[1] or 0), torch_version or version("torch"), count)


def _check_cuda(device: str, index: int, torch_version: str, count: Callable[[], int]) -> None:
    if _OTHER_DRIVER in torch_version:
        return
    if _WITHOUT_CUDA in torch_version:
        raise ConfigurationError(f"device {device!r}: this PyTorch ({torch_version}) was built without CUDA")
    if index >= (found := count()):
        raise ConfigurationError(f"device {device!r}: the NVIDIA driver shows {found} devices here")
