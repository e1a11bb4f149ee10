"""Which processes carry a mark in their environment."""

import os
from pathlib import Path


def is_alive(pid: int) -> bool:
    """Whether a process of that id exists and has not ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def marked_with(mark: str) -> dict[int, str]:
    """Every living process but this one whose environment holds `mark`, with its command line."""
    found: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if mark.encode() in environment and int(folder.name) != os.getpid():
            found[int(folder.name)] = command
    return found
