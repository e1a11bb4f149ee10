"""`lemix simulate` with a person's arguments."""

import json
from pathlib import Path

import pytest

from tests.support.command import lemix_here

RUN = ("--nodes", "2", "--stages", "2", "--profile", "gpt2-small@rtx6000ada", "--tasks", "40", "--rate", "30")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in the test's folder."""
    monkeypatch.chdir(tmp_path)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_it_prints_a_table_and_leaves_three_files(tmp_path: Path) -> None:
    ended = lemix_here("simulate", *RUN, "--policy", "lemix", "--training-rate", "0.5", "--schedule", "async")
    assert (ended.status, ended.errors) == (0, "")
    assert "20 of 20 answered" in ended.output
    assert "100.0 % of 20" in ended.output
    folder = tmp_path / "runs" / "simulate"
    assert f"written to {folder.relative_to(tmp_path)}" in ended.output
    assert files(folder) == {"run.json", "events.jsonl", "timeline.png"}
    summary = json.loads((folder / "run.json").read_text())
    assert summary["metrics"]["num_answered"] == 20
    assert summary["options"]["hop_s"] == 0.0005


def test_a_trace_is_replayed(tmp_path: Path) -> None:
    rows = "".join(f"{0.1 * i:.1f},{50 + i},{1 + i}\n" for i in range(10))
    (tmp_path / "trace.csv").write_text("timestamp,prompt_tokens,output_tokens\n" + rows)
    arguments = ("--trace", "trace.csv", "--training-rate", "0", "--tasks", "10", "--output", "here")
    ended = lemix_here("simulate", *RUN[:6], *arguments)
    assert (ended.status, ended.errors) == (0, "")
    events = [json.loads(line) for line in (tmp_path / "here" / "events.jsonl").read_text().splitlines()]
    requests = sorted(
        (event for event in events if event["event"] == "request"), key=lambda event: event["arrived_s"]
    )
    assert [request["lengths"] for request in requests] == [[50 + i] for i in range(10)]
    assert [len(request["token_times_s"][0]) for request in requests] == list(range(1, 11))


def test_arrivals_that_have_their_own_rate_need_none() -> None:
    ended = lemix_here("simulate", *RUN[:-2], "--arrivals", "all")
    assert (ended.status, ended.errors) == (0, "")
    assert "20 of 20 answered" in ended.output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--policy", "best"), "best"),
        (("--profile", "gpt9@a100"), "gpt9"),
        (("--release", "poisson"), "training_per_s must be given"),
        (("--trace", "nowhere.csv"), "nowhere.csv"),
        (("--max-tokens", "5", "2"), "max_tokens"),
        (("--arrivals", "all"), "rate_per_s=30.0 would do nothing"),
        (("--at", "1 s: explode 0"), "1 s: explode 0"),
        (("--at", "1 s: fail 2"), "node 2 is not there"),
        (("--node-profile", "1=gpt2-medium@a100"), "gpt2-small and gpt2-medium"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path: Path, arguments: tuple[str, ...], named: str) -> None:
    ended = lemix_here("simulate", *RUN, *arguments)
    assert ended.status == 1
    assert ended.errors.startswith("error: ") and named in ended.errors
    assert len(ended.errors.splitlines()) == 1
    assert files(tmp_path) == set()


def test_nodes_that_differ_and_change_are_told_by_options(tmp_path: Path) -> None:
    arguments = ("--node-profile", "1=gpt2-small@h200", "--at", "0.1 s: slow 0 2", "--at", "0.2 s: join 2")
    ended = lemix_here("simulate", *RUN, *arguments)
    assert (ended.status, ended.errors) == (0, "")
    options = json.loads((tmp_path / "runs" / "simulate" / "run.json").read_text())["options"]
    assert options["node_profiles"] == {"1": "gpt2-small@h200"}
    assert [(each["at_s"], each["kind"], each["node"]) for each in options["events"]] == [
        (0.1, "slow", 0),
        (0.2, "join", 2),
    ]
