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


def load(name: str = "compose.yaml") -> Compose:
    """The file with its anchors resolved and every `${NAME:-default}` set to its default."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (ROOT / name).read_text())
    content: Compose = yaml.safe_load(text.replace("$$", "$"))
    return content


def own_services(compose: Compose) -> dict[str, Compose]:
    """Those that serve and train. Each also has its own name, under `name`."""
    return {
        name: service | {"name": name}
        for name, service in compose["services"].items()
        if service["image"] == "lemix" and "test" in service.get("healthcheck", {})
    }


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
            "/tmp/": f"{self.tmp(service)}/",  # first: this machine's own places may begin so, too
            "nats:4222": self.nats,
            "nats:8222": self.nats_monitor,
            "127.0.0.1:8000": self.gateway,
            "otel-collector:4318": self.collector,
            **volumes,
            "/app/nats_users": str(self.nats_users),
        }

    @property
    def nats_users(self) -> Path:
        """Where all of the server's users are."""
        return self.folder / "users"

    def tmp(self, service: Compose) -> Path:
        """The service's own folder for temporary files."""
        return self.folder / "tmp" / str(service["name"])

    def local(self, service: Compose, text: str) -> str:
        """`text` of a service's command or environment, for this machine."""
        for there, here in self._substitutions(service).items():
            text = text.replace(there, here)
        return text

    def command(self, service: Compose) -> list[str]:
        """A service's command, with this interpreter."""
        program, *arguments = service["command"]
        assert program == "python"
        return [sys.executable, *arguments]

    def check(self, service: Compose) -> list[str]:
        """The command of a service's health check."""
        kind, command = service["healthcheck"]["test"]
        assert kind == "CMD-SHELL"
        return ["sh", "-c", command]

    def environment(self, service: Compose) -> dict[str, str]:
        """A service's environment, and nothing of LeMix's that this process may have."""
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("LEMIX_", "OTEL_"))
        }
        given = {name: value for name, value in service["environment"].items() if value is not None}
        own = {name: self.local(service, value) for name, value in given.items()}
        return inherited | own | {"PYTHONPATH": str(ROOT)}

    def make_folders(self, service: Compose) -> None:
        """Those of its volumes and of its temporary files."""
        self.tmp(service).mkdir(parents=True)
        for volume in service.get("volumes", ()):
            (self.folder / "volumes" / volume.split(":")[0]).mkdir(parents=True, exist_ok=True)
