"""`lemix simulate` as a person runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

LEMIX = str(Path(sys.executable).with_name("lemix"))
DEADLINE_S = 120.0
RUN = ("--nodes", "2", "--stages", "2", "--profile", "gpt2-small@rtx6000ada", "--tasks", "40", "--rate", "30")


def simulate(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [LEMIX, "simulate", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_it_prints_a_table_and_leaves_three_files(tmp_path: Path) -> None:
    ended = simulate(tmp_path, *RUN, "--policy", "lemix", "--training-rate", "0.5", "--schedule", "async")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "20 of 20 answered" in ended.stdout
    assert "100.0 % of 20" in ended.stdout
    folder = tmp_path / "runs" / "simulate"
    assert f"written to {folder.relative_to(tmp_path)}" in ended.stdout
    assert files(folder) == {"run.json", "events.jsonl", "timeline.png"}
    summary = json.loads((folder / "run.json").read_text())
    assert summary["metrics"]["num_answered"] == 20
    assert summary["options"]["hop_s"] == 0.0005


def test_a_trace_is_replayed(tmp_path: Path) -> None:
    rows = "".join(f"{0.1 * i:.1f},{50 + i},{1 + i}\n" for i in range(10))
    (tmp_path / "trace.csv").write_text("timestamp,prompt_tokens,output_tokens\n" + rows)
    arguments = ("--trace", "trace.csv", "--training-rate", "0", "--tasks", "10", "--output", "here")
    ended = simulate(tmp_path, *RUN[:6], *arguments)
    assert (ended.returncode, ended.stderr) == (0, "")
    events = [json.loads(line) for line in (tmp_path / "here" / "events.jsonl").read_text().splitlines()]
    requests = sorted(
        (event for event in events if event["event"] == "request"), key=lambda event: event["arrived_s"]
    )
    assert [request["lengths"] for request in requests] == [[50 + i] for i in range(10)]
    assert [len(request["token_times_s"][0]) for request in requests] == list(range(1, 11))


def test_arrivals_that_have_their_own_rate_need_none(tmp_path: Path) -> None:
    ended = simulate(tmp_path, *RUN[:-2], "--arrivals", "all")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "20 of 20 answered" in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--policy", "best"), "best"),
        (("--profile", "gpt9@a100"), "gpt9"),
        (("--release", "poisson"), "training_per_s must be given"),
        (("--trace", "nowhere.csv"), "nowhere.csv"),
        (("--max-tokens", "5", "2"), "max_tokens"),
        (("--arrivals", "all"), "rate_per_s=30.0 would do nothing"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path: Path, arguments: tuple[str, ...], named: str) -> None:
    ended = simulate(tmp_path, *RUN, *arguments)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ") and named in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert files(tmp_path) == set()
