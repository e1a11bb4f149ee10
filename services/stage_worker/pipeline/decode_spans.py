"""One span for the decoding of a request on this stage, instead of one for each token."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from services.stage_worker.compute.executor import SequenceChunk
from shared.telemetry import Telemetry

QUIET_S = 2.0
"""A request without a token for so long has ended, or pauses: most stages are not told which."""


@dataclass(slots=True)
class _Decoding:
    """A request that this stage has seen; times are monotonic."""

    traceparent: str
    began_s: float
    ended_s: float
    num_tokens: int = 0


class DecodeSpans:
    """Gathers iterations into spans. Holds the requests of the last QUIET_S."""

    def __init__(self, telemetry: Telemetry, *, node: int, stage: int) -> None:
        self._telemetry = telemetry
        self._place = {"lemix.node": node, "lemix.stage": stage}
        self._seen: dict[str, _Decoding] = {}

    def add(self, chunks: Sequence[SequenceChunk], began_s: float, ended_s: float) -> None:
        """Note an iteration. Pieces of prompts bear the trace; a request without one is not noted."""
        for chunk in chunks:
            if chunk.traceparent:
                new = _Decoding(chunk.traceparent, ended_s, ended_s)
                self._seen.setdefault(chunk.task_id, new).ended_s = ended_s
            elif (decoding := self._seen.get(chunk.task_id)) is not None:
                if decoding.num_tokens == 0:
                    decoding.began_s = began_s
                decoding.num_tokens += 1
                decoding.ended_s = ended_s

    def write_quiet(self, now_s: float, now_wall_s: float, *, quiet_s: float = QUIET_S) -> None:
        """Write the spans of requests that have been quiet for so long."""
        is_quiet = [task_id for task_id, each in self._seen.items() if now_s - each.ended_s >= quiet_s]
        for task_id in is_quiet:
            self._write(self._seen.pop(task_id), now_wall_s - now_s)

    def write_all(self, now_s: float, now_wall_s: float) -> None:
        """Write all: the stage ends."""
        self.write_quiet(now_s, now_wall_s, quiet_s=-math.inf)

    def _write(self, decoding: _Decoding, wall_offset_s: float) -> None:
        if decoding.num_tokens:
            span = self._telemetry.span(
                "stage.decode",
                traceparent=decoding.traceparent,
                attributes=self._place | {"lemix.tokens": decoding.num_tokens},
                start_wall_s=wall_offset_s + decoding.began_s,
            )
            span.end(int((wall_offset_s + decoding.ended_s) * 1e9))
