"""Recorded requests from a CSV file: timestamp, prompt tokens, output tokens."""

import csv
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import NamedTuple

from shared.errors import ConfigurationError

AT_COLUMNS = ("timestamp", "arrived_at", "time")
PROMPT_COLUMNS = ("prompt_tokens", "contexttokens", "num_prefill_tokens", "input_tokens")
OUTPUT_COLUMNS = ("output_tokens", "generatedtokens", "num_decode_tokens", "completion_tokens")
"""Names that are understood, in any case; the second ones are those of the Azure traces."""


class TraceRow(NamedTuple):
    """One recorded request."""

    at_s: float
    """After the first one."""
    prompt_tokens: int
    output_tokens: int


def read_trace(path: Path, *, limit: int | None = None) -> tuple[TraceRow, ...]:
    """The first `limit` requests of a file, in the order of arrival.

    Timestamps are seconds, or dates in ISO 8601. Raises ConfigurationError naming the file and the line.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(islice(_rows(path, csv.reader(file)), limit))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigurationError(f"cannot read the trace {path}: {error}") from error
    if not rows:
        raise ConfigurationError(f"the trace {path} holds no request")
    began_s = rows[0].at_s
    return tuple(row._replace(at_s=row.at_s - began_s) for row in rows)


def at_rate(rows: Sequence[TraceRow], rate_per_s: float) -> tuple[TraceRow, ...]:
    """The same requests, stretched in time so that their mean rate is `rate_per_s`."""
    span_s = rows[-1].at_s if rows else 0.0
    factor = (len(rows) - 1) / rate_per_s / span_s if span_s else 0.0
    return tuple(row._replace(at_s=row.at_s * factor) for row in rows)


def _rows(path: Path, lines: Iterator[list[str]]) -> Iterator[TraceRow]:
    names = [name.strip().lower() for name in next(lines, [])]
    places = [_place(path, names, known) for known in (AT_COLUMNS, PROMPT_COLUMNS, OUTPUT_COLUMNS)]
    latest_s = float("-inf")
    for number, line in enumerate(lines, start=2):
        if not line:
            continue
        row = _row(f"{path}, line {number}", line, places)
        if row.at_s < latest_s:
            raise ConfigurationError(f"{path}, line {number}: is earlier than the line before")
        latest_s = row.at_s
        yield row


def _place(path: Path, names: Sequence[str], known: Sequence[str]) -> int:
    for place, name in enumerate(names):
        if name in known:
            return place
    raise ConfigurationError(f"{path}, line 1: no column {' or '.join(known)} among {', '.join(names)}")


def _row(where: str, line: Sequence[str], places: Sequence[int]) -> TraceRow:
    try:
        at, prompt, output = (line[place].strip() for place in places)
        row = TraceRow(_seconds(at), int(prompt), int(output))
    except (IndexError, ValueError) as error:
        raise ConfigurationError(f"{where}: {','.join(line)!r} is not a request: {error}") from error
    if row.prompt_tokens < 1 or row.output_tokens < 1:
        raise ConfigurationError(f"{where}: a request has at least 1 token of each kind")
    return row


def _seconds(timestamp: str) -> float:
    """Seconds of a timestamp, from any fixed moment. Raises ValueError."""
    try:
        seconds = float(timestamp)
    except ValueError:
        date = datetime.fromisoformat(timestamp)
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    if not isfinite(seconds):
        raise ValueError(f"{timestamp} is no time")
    return seconds
