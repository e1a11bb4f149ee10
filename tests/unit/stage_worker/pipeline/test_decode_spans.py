"""The decoding of a request is one span on each stage."""

from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from services.stage_worker.compute.executor import SequenceChunk
from services.stage_worker.pipeline.decode_spans import QUIET_S, DecodeSpans
from shared.telemetry import Telemetry

TRACE_ID, SPAN_ID = "1" * 32, "2" * 16
WALL_OFFSET_S = 1000.0


class Stage:
    """What a stage sees of requests, and the spans that came of it."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.telemetry = Telemetry("test", self.exporter)
        self.decoding = DecodeSpans(self.telemetry, node=3, stage=1)

    def prefill(self, task_id: str, at_s: float, *, traced: bool = True) -> None:
        traceparent = f"00-{TRACE_ID}-{SPAN_ID}-01" if traced else ""
        self._add(task_id, at_s, num_tokens=5, traceparent=traceparent)

    def decode(self, task_id: str, at_s: float) -> None:
        self._add(task_id, at_s, num_tokens=1, traceparent="")

    def _add(self, task_id: str, at_s: float, **fields: Any) -> None:
        chunk = SequenceChunk(task_id=task_id, start=0, blocks=(), produces=True, **fields)
        self.decoding.add([chunk], at_s, at_s + 0.25)

    def write_quiet(self, now_s: float) -> None:
        self.decoding.write_quiet(now_s, now_s + WALL_OFFSET_S)

    def spans(self) -> list[ReadableSpan]:
        self.telemetry.close()
        return [span for span in self.exporter.get_finished_spans() if span.name == "stage.decode"]


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_the_tokens_of_a_request_are_one_span_of_its_trace(stage: Stage) -> None:
    stage.prefill("a", 1.0)
    for at_s in (2.0, 3.0, 4.5):
        stage.decode("a", at_s)
        stage.write_quiet(at_s + 0.25)
    stage.write_quiet(4.75 + QUIET_S)
    stage.write_quiet(4.75 + 2 * QUIET_S)

    (span,) = stage.spans()
    assert dict(span.attributes) == {"lemix.node": 3, "lemix.stage": 1, "lemix.tokens": 3}
    assert f"{span.context.trace_id:032x}" == TRACE_ID
    assert f"{span.parent.span_id:016x}" == SPAN_ID
    assert (span.start_time, span.end_time) == (1002 * 10**9, 1004.75e9)


def test_each_request_has_its_own_and_what_has_no_trace_or_no_token_has_none(stage: Stage) -> None:
    stage.prefill("only a prompt", 1.0)
    stage.prefill("a", 1.0)
    stage.prefill("b", 1.0)
    stage.prefill("untraced", 1.0, traced=False)
    for task_id in ("a", "b", "b", "untraced", "never seen"):
        stage.decode(task_id, 2.0)
    stage.write_quiet(2.25 + QUIET_S)

    assert {dict(span.attributes)["lemix.tokens"] for span in stage.spans()} == {1, 2}


def test_nothing_is_held_of_requests_that_are_quiet(stage: Stage) -> None:
    for number in range(100):
        stage.prefill(str(number), number)
        stage.decode(str(number), number + 0.5)
        stage.write_quiet(number + 0.75)
        assert len(stage.decoding._seen) <= QUIET_S + 1


def test_what_is_left_is_written_when_the_stage_ends(stage: Stage) -> None:
    stage.prefill("a", 1.0)
    stage.decode("a", 2.0)
    stage.decoding.write_all(2.25, 2.25)

    assert len(stage.spans()) == 1
