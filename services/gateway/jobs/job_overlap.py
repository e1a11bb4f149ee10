"""On which nodes the batches of which jobs were, and until when. Pure; times are monotonic seconds."""

from collections.abc import Collection, Set


class JobOverlap:
    """Keeps, for each job and node, whether its batches are there, or when the last one left."""

    def __init__(self) -> None:
        self._here: dict[str, Set[int]] = {}
        self._left_s: dict[tuple[str, int], float] = {}

    def see(self, job_id: str, nodes: Set[int], now_s: float) -> None:
        """Note that the job's batches are on these nodes now."""
        for node in self._here.get(job_id, frozenset()) - nodes:
            self._left_s[job_id, node] = now_s
        self._here[job_id] = nodes

    def forget(self, job_id: str) -> None:
        """Note that the job will be on no node again."""
        self._here.pop(job_id, None)
        self._left_s = {key: left_s for key, left_s in self._left_s.items() if key[0] != job_id}

    def during(self, nodes: Collection[int], since_s: float) -> list[str]:
        """Jobs that had a batch on one of these nodes at some time since then."""
        return [
            job_id
            for job_id, here in self._here.items()
            if any(node in here or self._left_s.get((job_id, node), -1.0) >= since_s for node in nodes)
        ]
