"""compose.yaml as local processes: its commands and environments, with names and places of this machine."""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
Compose = dict[str, Any]


def load() -> Compose:
    """The file with its anchors resolved and every `${NAME:-default}` set to its default."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (ROOT / "compose.yaml").read_text())
    content: Compose = yaml.safe_load(text)
    return content


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the containers' names and folders lie on this machine."""

    folder: Path
    nats: str
    nats_monitor: str
    gateway: str
    collector: str

    def _substitutions(self, service: Compose) -> dict[str, str]:
        mounts = [volume.split(":") for volume in service.get("volumes", ())]
        volumes = {place: str(self.folder / "volumes" / name) for name, place, *_ in mounts}
        return {
            "nats:4222": self.nats,
            "nats:8222": self.nats_monitor,
            "127.0.0.1:8000": self.gateway,
            "otel-collector:4318": self.collector,
            **volumes,
            "/app/shared": str(ROOT / "shared"),
        }

    def local(self, service: Compose, text: str) -> str:
        """`text` of a service's command or environment, for this machine."""
        for there, here in self._substitutions(service).items():
            text = text.replace(there, here)
        return text

    def command(self, service: Compose, command: list[str]) -> list[str]:
        """A service's command, with this interpreter."""
        assert command[0] == "python"
        return [sys.executable, *(self.local(service, part) for part in command[1:])]

    def environment(self, service: Compose) -> dict[str, str]:
        """A service's environment, and nothing of LeMix's that this process may have."""
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("LEMIX_", "OTEL_"))
        }
        given = {name: value for name, value in service["environment"].items() if value is not None}
        own = {name: self.local(service, value) for name, value in given.items()}
        return inherited | own | {"PYTHONPATH": str(ROOT)}

    def make_volumes(self, service: Compose) -> None:
        for volume in service.get("volumes", ()):
            (self.folder / "volumes" / volume.split(":")[0]).mkdir(parents=True, exist_ok=True)
