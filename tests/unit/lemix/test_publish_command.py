"""The lines that tell a person what became of what was published."""

from pathlib import Path

import pytest
from msgspec import structs
from typer.testing import CliRunner

from lemix import publish_command
from lemix.commands import train
from lemix.publish_command import ADVICE, is_served, verdict
from shared.messages.weights import JudgedVersion, NodeWeights

JUDGED = JudgedVersion(version=6, judged_wall_s=1.0, why_withheld="it is bad")
WEIGHTS = NodeWeights(
    node=1,
    version=6,
    durable_version=6,
    published=6,
    held_out_loss=None,
    samples_loss=1.5,
    num_withheld=1,
    last_withheld=4,
    is_guarded=True,
    judged=(JudgedVersion(version=3, judged_wall_s=0.0), JUDGED),
)


@pytest.mark.parametrize(
    ("published", "newest_judged", "line"),
    [
        (6, 6, "node 1 serves version 6"),
        (3, 6, f"node 1 serves version 3; version 6 is withheld: it is bad ({ADVICE})"),
        (3, 4, "node 1 serves version 3; version 6 is not judged yet (lemix status tells)"),
        (None, 6, "node 1 is being restored: what it learnt is not judged yet (lemix status tells)"),
    ],
)
def test_a_person_is_told_which_version_serves_and_why(
    published: int | None, newest_judged: int, line: str
) -> None:
    now = structs.replace(WEIGHTS, published=published, newest_judged=newest_judged)
    assert verdict(now, 6) == line
    assert is_served(now, 6) == (published == 6)


@pytest.mark.parametrize(("served", "status"), [(True, 0), (False, 3)])
def test_the_exit_status_says_whether_what_was_learnt_is_served(
    served: bool, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def published(*_: object, **__: object) -> bool:
        return served

    monkeypatch.setattr(publish_command, "run_publish", published)
    (tmp_path / "batches.jsonl").write_text('{"text": "once"}')
    asked = ["publish", str(tmp_path / "batches.jsonl"), "--follow", "--nats-url", "nats://127.0.0.1:1"]
    assert CliRunner().invoke(train.app, asked).exit_code == status
