"""Whether the system answers: proven by a token that has moved through a whole node."""

import asyncio
from dataclasses import dataclass

from services.gateway.cluster_client import ClusterClient
from services.gateway.sent_sequence import SequenceSpec
from shared.clock import Clock
from shared.errors import LemixError
from shared.messages.inference import Objective, Sampling
from shared.model_files import ModelCard

_REUSE_S = 1.0
READY_S = 30.0
"""For so long after a token the gateway counts as ready: that is asked for often, and is to cost little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """The outcome of one probe."""

    reason: str
    """Why no token came; empty: one came."""
    seconds: float
    """How long the probe took."""
    weights_version: int | None = None


class HealthProbe:
    """Runs one probe at a time, and keeps its outcome."""

    def __init__(self, cluster: ClusterClient, clock: Clock, *, card: ModelCard, timeout_s: float) -> None:
        token = next((token for token in (card.bos_token_id, *card.eos_token_ids) if token is not None), 0)
        self._cluster = cluster
        self._clock = clock
        self._spec = SequenceSpec(
            prompt=(token,),
            sampling=Sampling(max_tokens=1, temperature=0.0),
            # With times that a cluster keeps that has too much to do: nobody is to restart it for that.
            objective=Objective(ttft_s=timeout_s, tbt_s=timeout_s, when_late="serve_last"),
        )
        self._timeout_s = timeout_s
        self._asking: asyncio.Task[None] | None = None
        self._latest: tuple[float, Health] | None = None

    async def check(self) -> Health:
        """The latest outcome, at most a second old."""
        return await self._check(_REUSE_S)

    async def check_ready(self) -> Health:
        """The latest outcome: a token of the last half minute, or what comes of asking for one now."""
        is_good = self._latest is not None and not self._latest[1].reason
        return await self._check(READY_S if is_good else _REUSE_S)

    async def is_ready(self) -> bool:
        return not (await self.check_ready()).reason

    async def _check(self, max_age_s: float) -> Health:
        while self._latest is None or self._clock.now_s() - self._latest[0] > max_age_s:
            if self._asking is None:
                self._asking = self._cluster.spawn(self._probe())
            await asyncio.shield(self._asking)
        return self._latest[1]

    async def _probe(self) -> None:
        begin_s = self._clock.now_s()
        reason, version = "", None
        try:
            async with asyncio.timeout(self._timeout_s):
                version = await self._one_token()
        except TimeoutError:
            reason = f"no token within {self._timeout_s:g} s"
        except LemixError as error:
            reason = str(error)
        end_s = self._clock.now_s()
        self._latest = end_s, Health(reason=reason, seconds=end_s - begin_s, weights_version=version)
        self._asking = None

    async def _one_token(self) -> int:
        """Generate one token; returns the weights version that made it."""
        session = self._cluster.submit([self._spec])
        try:
            while True:
                for arrival in await session.next():
                    if arrival.result.finish is not None:
                        return arrival.weights_version
        finally:
            session.close()
