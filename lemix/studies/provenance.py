"""Where the runs of a study come from: code, day, machine."""

import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime


def code_here() -> str:
    """The commit of the working tree that we run in, `-dirty` when it has changes; empty: there is none."""
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, timeout=10
    )
    return told.stdout.strip()


def made_by(commits: Mapping[str, int]) -> str:
    """A sentence about the code of so many runs each, and about this day and machine."""
    runs = ", ".join(f"{commit or 'unknown code'} ({count} runs)" for commit, count in commits.items())
    return (
        f"Code: {runs}. Written on {datetime.now(UTC):%Y-%m-%d} with Python {platform.python_version()} on"
        f" {platform.machine()}, {os.cpu_count()} cores."
    )
