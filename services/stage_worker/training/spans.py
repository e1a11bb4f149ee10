"""Spans of a stage's training ops."""

from collections.abc import Mapping
from typing import Any

from services.stage_worker.context import WorkerContext
from shared.messages.training import Microbatch

NO_ATTRIBUTES: Mapping[str, int] = {}


class TrainingSpans:
    """Each names the node and the stage."""

    def __init__(self, context: WorkerContext) -> None:
        self._telemetry = context.telemetry
        self._place = {"lemix.node": context.settings.node, "lemix.stage": context.settings.stage}

    def of(self, name: str, traceparent: str, more: Mapping[str, int] = NO_ATTRIBUTES) -> Any:
        """A span of the trace that began with the batch."""
        return self._telemetry.span(name, traceparent=traceparent, attributes={**self._place, **more})

    def of_microbatch(self, name: str, microbatch: Microbatch) -> Any:
        return self.of(name, microbatch.traceparent, {"lemix.microbatch": microbatch.index})
