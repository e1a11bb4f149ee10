"""Waiting for the API to be well."""

import asyncio
import ssl

import httpx

EVERY_S = 0.1
TIMEOUT_S = 10.0
"""Longer than the gateway's own patience with a node, so that its reason arrives."""


class HealthProbe:
    """Asks `/health` until it answers 200."""

    def __init__(self, api_url: str, tls: ssl.SSLContext | None = None) -> None:
        self._api_url = api_url
        self._tls = tls
        self.last_answer = "no answer"
        """The fault that was found when it was asked last."""

    async def wait(self) -> None:
        """Return at the first 200; the caller sets the deadline."""
        async with httpx.AsyncClient(
            base_url=self._api_url, timeout=TIMEOUT_S, trust_env=False, verify=self._tls or True
        ) as api:
            while not await self._is_well(api):  # noqa: ASYNC110  # over HTTP there is no event to wait for
                await asyncio.sleep(EVERY_S)

    async def _is_well(self, api: httpx.AsyncClient) -> bool:
        try:
            response = await api.get("/health")
        except httpx.HTTPError as error:
            self.last_answer = f"no answer ({type(error).__name__})"
            return False
        self.last_answer = response.text.strip()
        return response.status_code == 200
