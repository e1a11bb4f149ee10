from pathlib import Path

import pytest

from lemix.client import Completion
from lemix.demo_figure import draw_demo
from lemix.demo_record import DemoRecord, LossPoint
from lemix.load import Outcome, PlannedRequest

ANSWER = Completion(
    text="x",
    finish_reason="length",
    prompt_tokens=1,
    completion_tokens=1,
    ttft_s=0.125,
    tbt_s=(),
    weights_versions=(0, 1),
)


def asked(at_s: float, *, is_chat: bool) -> PlannedRequest:
    return PlannedRequest(at_s=at_s, prompt="p", max_tokens=1, is_chat=is_chat)


RECORD = DemoRecord(
    losses=[LossPoint(0.5, 6.25), LossPoint(9.5, 3.125)],
    applied_at_s=[2.0, 4.0, 4.0],
    outcomes=[
        Outcome(asked(1.0, is_chat=False), ANSWER, "", 1.5),
        Outcome(asked(3.0, is_chat=True), ANSWER, "", 3.5),
        Outcome(asked(5.0, is_chat=True), None, "HTTP 503: full", 5.5),
    ],
)


def test_the_picture_tells_of_every_batch_and_every_request(tmp_path: Path) -> None:
    draw_demo(RECORD, tmp_path / "demo.svg")
    drawn = (tmp_path / "demo.svg").read_text()
    told = [line.split("<!-- ")[1].split(" -->")[0] for line in drawn.splitlines() if "<!-- " in line]
    assert "One model learns from 3 training batches while it answers 3 requests (1 failed)" in told
    assert {"completion", "chat", "failed", "seconds since requests began"} <= set(told)


@pytest.mark.parametrize("record", [DemoRecord(), RECORD])
def test_a_picture_is_drawn_whatever_came(record: DemoRecord, tmp_path: Path) -> None:
    draw_demo(record, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
