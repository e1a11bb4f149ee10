"""Spans as they stand in spans.jsonl."""

import json
from pathlib import Path

from opentelemetry.trace import Status, StatusCode

from shared.telemetry import JsonLinesExporter, Telemetry


def test_a_span_is_written_with_its_status_and_events(tmp_path: Path) -> None:
    telemetry = Telemetry("test", JsonLinesExporter(tmp_path / "spans.jsonl"))
    failed = telemetry.span("failed", attributes={"number": 7})
    failed.add_event("first token", {"place": 0}, timestamp=5)
    failed.set_status(Status(StatusCode.ERROR, "the node is gone"))
    failed.end()
    telemetry.span("plain").end()
    telemetry.close()

    spans = {
        span["name"]: span for span in map(json.loads, (tmp_path / "spans.jsonl").read_text().splitlines())
    }
    assert (spans["failed"]["status"], spans["failed"]["status_description"]) == ("ERROR", "the node is gone")
    assert spans["failed"]["events"] == [{"name": "first token", "unix_ns": 5, "attributes": {"place": 0}}]
    assert spans["failed"]["attributes"] == {"number": 7}
    assert (spans["plain"]["status"], spans["plain"]["events"]) == ("UNSET", [])


def test_the_file_of_spans_is_bounded_and_the_newest_stay(tmp_path: Path) -> None:
    path, older = tmp_path / "spans.jsonl", tmp_path / "spans.jsonl.1"
    exporter = JsonLinesExporter(path, max_bytes=2000)
    other = JsonLinesExporter(path, max_bytes=2000)  # another process
    for number in range(100):
        telemetry = Telemetry("test", (exporter, other)[number % 2])
        telemetry.span(f"span {number}").end()
        telemetry.close()
    size = path.stat().st_size if path.exists() else 0
    assert size + older.stat().st_size < 2 * 3000
    kept = older.read_text() + (path.read_text() if path.exists() else "")
    names = [json.loads(line)["name"] for line in kept.splitlines()]
    assert "span 99" in names
    assert "span 0" not in names
