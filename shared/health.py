"""Whether a service is well: one line in its log when it is ready, and a file that stays fresh while it is.

The health check of a container looks at the file's age, which needs no import and no connection.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from shared.errors import ConfigurationError

LOOK_EVERY_S = 1.0
"""Until the service is ready."""
FRESHEN_EVERY_S = 5.0

IsWell = Callable[[], Awaitable[bool]]

log = logging.getLogger(__name__)


async def always_well() -> bool:
    """Says yes: for a service that is well while its event loop runs and NATS answers."""
    return True


class Health:
    """The health of one process. The service calls `begin`; whoever runs the process runs `keep`."""

    def __init__(self, file: Path | None = None) -> None:
        """`file`: what stays fresh; None: only the line is written."""
        self._file = file
        self._what = ""
        self._is_well: IsWell | None = None

    def begin(self, what: str, is_well: IsWell = always_well) -> None:
        """Let the service be ready as soon as `is_well` says so; `what` tells people what is."""
        self._what, self._is_well = what, is_well

    async def keep(self, ping: IsWell) -> None:
        """Watch the service until cancelled; it is well while `ping` and its own `is_well` say so.

        Raises ConfigurationError when the file cannot be written.
        """
        self._remove()
        is_announced = False
        while True:
            await asyncio.sleep(FRESHEN_EVERY_S if is_announced else LOOK_EVERY_S)
            if is_announced and self._file is None:
                continue
            if self._is_well is None or not (await ping() and await self._is_well()):
                continue
            if not is_announced:
                log.info("ready: %s", self._what)
                is_announced = True
            self._freshen()

    def _remove(self) -> None:
        """The file of an earlier process says nothing of this one."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _freshen(self) -> None:
        """Not in a thread: the file is in memory where health checks are made."""
        try:
            if self._file is not None:
                self._file.touch()
        except OSError as error:
            raise ConfigurationError(f"LEMIX_HEALTH_FILE: {error}") from error


def show_readiness() -> None:
    """Let the line through, whatever LEMIX_LOG_LEVEL says."""
    log.setLevel(logging.INFO)
