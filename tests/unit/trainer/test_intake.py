"""A message becomes a batch, or the reason why not: nothing that it says ends the trainer."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from services.trainer.intake import Intake
from services.trainer.settings import TrainerSettings
from shared.bus.base import StreamMessage
from shared.clock import SystemClock
from shared.encoding import ExampleEncoder
from shared.messages.training import RejectedBatch
from shared.settings import EMBEDDED_MODEL

BODY = b'{"examples": [{"token_ids": [1, 2, 3]}]}'


async def ack() -> None:
    pass


def prepared(body: bytes, **headers: str) -> object:
    intake = Intake.load(TrainerSettings(), Path(EMBEDDED_MODEL), SystemClock())
    return intake.prepare(StreamMessage(7, body, headers, ack))


@pytest.mark.parametrize(
    ("body", "headers"),
    [(BODY.replace(b"{", b'{"id": "seq-7", ', 1), {}), (BODY, {"Nats-Msg-Id": "seq-7"})],
)
def test_an_id_like_those_of_nameless_batches_is_refused(body: bytes, headers: dict[str, str]) -> None:
    reason = "id: ids that begin with 'seq-' are kept for batches without one"
    assert prepared(body, **headers) == RejectedBatch.of(body, batch_id="seq-7", sequence=7, reason=reason)


def test_an_unexpected_error_rejects_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(encoder: ExampleEncoder, example: object) -> Sequence[int]:
        raise RecursionError("too deep")

    monkeypatch.setattr(ExampleEncoder, "encode", broken)
    reason = "RecursionError: too deep"
    assert prepared(BODY) == RejectedBatch.of(BODY, batch_id="seq-7", sequence=7, reason=reason)
