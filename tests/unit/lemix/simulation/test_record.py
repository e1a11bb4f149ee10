import json
import pickle

import pytest

from lemix.simulation.record import BatchRecord, Op, OpLog, RequestRecord, RunRecord, event_lines

OPS = [
    Op(0, 0, "iteration", 0.1, 0.2, 30),
    Op(999, 3, "step", 0.25, 0.75, 0),
    Op(0, 1, "backward", 0.2, 0.5, 70_000),
]


def log_of(ops: list[Op]) -> OpLog:
    log = OpLog()
    for op in ops:
        log.append(op)
    return log


def request(*token_times_s: tuple[float, ...]) -> RequestRecord:
    return RequestRecord(
        arrived_s=0.0,
        lengths=(10,) * len(token_times_s),
        ended_s=0.6,
        nodes=(0,) * len(token_times_s),
        token_times_s=token_times_s,
    )


def test_ops_come_back_as_they_went_in() -> None:
    log = log_of(OPS)
    assert list(log) == list(log) == OPS
    assert len(log) == 3
    assert list(pickle.loads(pickle.dumps(log))) == OPS  # noqa: S301


def test_an_op_takes_little_room() -> None:
    assert len(pickle.dumps(log_of(OPS * 10_000))) < 48 * 30_000


def test_a_request_of_several_sequences_has_begun_when_all_have() -> None:
    assert request((0.5, 0.6), (0.4, 0.5)).first_token_s == 0.5
    assert request((0.5, 0.6), ()).first_token_s is None


def test_events_are_in_the_order_of_their_ends() -> None:
    record = RunRecord(
        num_nodes=1000,
        num_stages=4,
        ended_s=0.8,
        requests=(request((0.6,)),),
        batches=(
            BatchRecord(published_s=0.0, num_tokens=9, applied_s=None, node=None),
            BatchRecord(published_s=0.1, num_tokens=70_000, applied_s=0.8, node=999),
        ),
        ops=log_of(OPS),
    )
    events = [json.loads(line) for line in event_lines(record)]
    assert [event["event"] for event in events] == ["op", "op", "request", "op", "batch", "batch"]
    assert events[1] == {
        "event": "op",
        "node": 0,
        "stage": 1,
        "kind": "backward",
        "start_s": 0.2,
        "end_s": 0.5,
        "num_tokens": 70_000,
        "given_way_s": 0.0,
    }
    assert events[2]["token_times_s"] == [[0.6]]
    assert [event["applied_s"] for event in events[4:]] == [0.8, None]
    assert all(line.endswith("\n") for line in event_lines(record))


def test_seconds_of_events_are_short() -> None:
    log = log_of([Op(0, 0, "forward", 0.1 + 0.2, 1 / 3, 1)])
    record = RunRecord(num_nodes=1, num_stages=1, ended_s=1.0, requests=(), batches=(), ops=log)
    (event,) = (json.loads(line) for line in event_lines(record))
    assert (event["start_s"], event["end_s"]) == (0.3, pytest.approx(1 / 3))
    assert len(str(event["end_s"])) == 11
