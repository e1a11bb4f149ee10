"""Real collective groups in virtual time, where a thread that waits for another one would wait for ever."""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from services.stage_worker.compute.local_stages import LocalStages
from services.stage_worker.compute.torch_executor import TorchExecutor
from services.stage_worker.settings import StageWorkerSettings
from services.stage_worker.training.replica import Copied
from shared.errors import PeerLostError
from shared.messages.weights import MergeGroup, OuterStep

Place = tuple[str, int]
"""Name of a group, and the stage whose nodes form it."""


@dataclass
class _Member:
    work: Callable[[], None]
    done: "asyncio.Future[None]"


class Meetings:
    """Members wait for each other in the loop, where they may die; then all of them work, in threads of their
    own, while the loop stands still.
    """

    def __init__(self) -> None:
        self._waiting: defaultdict[Place, dict[int, _Member]] = defaultdict(dict)
        """By node."""

    async def attend(
        self, place: Place, node: int, num_members: int, work: Callable[[], None], *, timeout_s: float
    ) -> None:
        """Returns when the work is done, which needs the others. Raises PeerLostError when they do not come,
        and what `work` raises.
        """
        members = self._waiting[place]
        members[node] = _Member(work, asyncio.get_running_loop().create_future())
        if len(members) == num_members:
            self._hold(self._waiting.pop(place))
        try:
            async with asyncio.timeout(timeout_s):
                await members[node].done
        except TimeoutError as error:
            raise PeerLostError(f"of {num_members} members {sorted(members)} have come") from error
        finally:
            del members[node]

    def _hold(self, members: dict[int, _Member]) -> None:
        with ThreadPoolExecutor(len(members)) as threads:
            running = [(member.done, threads.submit(member.work)) for member in members.values()]
        for done, finished in running:
            if error := finished.exception():
                done.set_exception(error)
            else:
                done.set_result(None)


class MeetingExecutor(TorchExecutor):
    """Computes, copies and averages as its base does."""

    def __init__(
        self, settings: StageWorkerSettings, instance: str, meetings: Meetings, local: LocalStages
    ) -> None:
        super().__init__(settings, instance, local)
        self._meetings = meetings
        self._turn = asyncio.Lock()
        """Who waits for peers occupies the thread for it, whatever comes next."""

    async def copy_state(self) -> Copied:
        async with self._turn:
            return await super().copy_state()

    async def average(
        self, copied: Copied, group: MergeGroup, rendezvous: str, outer: OuterStep | None = None
    ) -> None:
        async with self._turn:
            await self._meetings.attend(
                (group.name, self._settings.stage),
                self._settings.node,
                len(group.members),
                partial(self._average, copied, group, rendezvous, outer),
                timeout_s=self._settings.collective_timeout_s,
            )
