"""Permission errors of the NATS server, which tells them beside all calls: here they reach the calls."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from shared.bus.permissions import User
from shared.errors import NotAllowedError

VIOLATION = re.compile(r'permissions violation for (publish|subscription) to "([^"]*)"')
"""As nats-py hands it on: all in small letters."""


class Refusals:
    """Those of one connection, as `user`."""

    def __init__(self, user: User | None) -> None:
        self._name = user.name if user else ""
        self._waiting: dict[asyncio.Timeout, tuple[str, ...]] = {}
        """By the deadline of a call: how the subjects begin that it sends on."""
        self._reasons: dict[asyncio.Timeout, str] = {}
        """Why a call has failed, by its deadline."""
        self._unheard: set[str] = set()
        """Subjects of subscriptions that were refused."""
        self.newest = ""
        """The last one, for a person."""

    def is_noted(self, error: Exception) -> bool:
        """Whether this is a permission error; then the calls that it is of fail."""
        found = VIOLATION.search(str(error))
        if found is None:
            return False
        kind, subject = found.groups()
        self.newest = self._told("send" if kind == "publish" else "hear", subject)
        if kind == "subscription":
            self._unheard.add(subject)
            return True
        for deadline, beginnings in self._waiting.items():
            if subject.startswith(beginnings) and not deadline.expired():
                self._reasons[deadline] = self.newest
                deadline.reschedule(0.0)
        return True

    @asynccontextmanager
    async def raised(self, *beginnings: str) -> AsyncIterator[None]:
        """Around a call that sends on subjects that begin so: raise NotAllowedError when one is refused."""
        try:
            async with asyncio.timeout(None) as deadline:
                self._waiting[deadline] = tuple(each.lower() for each in beginnings)
                try:
                    yield
                finally:
                    del self._waiting[deadline]
        except TimeoutError:
            if deadline not in self._reasons:
                raise
            raise NotAllowedError(self._reasons[deadline]) from None
        finally:
            self._reasons.pop(deadline, None)

    def check_heard(self, name: str) -> None:
        """Raises NotAllowedError when a subscription to that subject was refused."""
        if name.lower() in self._unheard:
            raise NotAllowedError(self._told("hear", name))

    def _told(self, what: str, subject: str) -> str:
        return f"the NATS user {self._name!r} may not {what} {subject}"
