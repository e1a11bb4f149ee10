"""The limits of known devices, from their makers' data sheets."""

from dataclasses import dataclass

from shared.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLimits:
    """Peak numbers: nothing reaches them (see `roofline` for what is reached)."""

    flops_per_s: float
    """Dense 16-bit matrix products that are summed in 32 bits."""
    bytes_per_s: float
    """Bandwidth of the device's own memory."""
    memory_bytes: float
    host_bytes_per_s: int
    """Attained from and to the host's memory, in one direction."""


PCIE_4_BYTES_PER_S = 25_000_000_000
"""16 lanes of 16 GT/s carry 31.5 GB/s by the specification; large copies from pinned memory attain about
four fifths (NVIDIA's `bandwidthTest`)."""
PCIE_5_BYTES_PER_S = 2 * PCIE_4_BYTES_PER_S

DEVICES = {
    # NVIDIA RTX 6000 Ada data sheet: 48 GB GDDR6, 960 GB/s, 1457 TFLOPS for sparse FP8; half of it dense,
    # half of that in 16 bits.
    "rtx6000ada": DeviceLimits(
        flops_per_s=1457e12 / 4, bytes_per_s=960e9, memory_bytes=48e9, host_bytes_per_s=PCIE_4_BYTES_PER_S
    ),
    # NVIDIA A100 data sheet, 80 GB SXM.
    "a100": DeviceLimits(
        flops_per_s=312e12, bytes_per_s=2039e9, memory_bytes=80e9, host_bytes_per_s=PCIE_4_BYTES_PER_S
    ),
    # NVIDIA H200 data sheet, SXM: 1979 TFLOPS for sparse BF16, half of it dense.
    "h200": DeviceLimits(
        flops_per_s=1979e12 / 2, bytes_per_s=4.8e12, memory_bytes=141e9, host_bytes_per_s=PCIE_5_BYTES_PER_S
    ),
}


def device_limits(name: str) -> DeviceLimits:
    """The limits of a known device. Raises ConfigurationError, naming the choices."""
    if name not in DEVICES:
        raise ConfigurationError(f"device {name!r} has no analytic profile; choices: {', '.join(DEVICES)}")
    return DEVICES[name]
