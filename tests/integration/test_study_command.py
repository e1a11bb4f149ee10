"""`lemix study` with a person's arguments: the quick form of the main study, from end to end."""

import json
from pathlib import Path

import pytest

from tests.support.command import lemix_here


def test_a_quick_study_leaves_table_verdicts_figures_and_its_runs(tmp_path: Path) -> None:
    ended = lemix_here("study", "main", "--quick", "--runs-dir", str(tmp_path))
    assert (ended.status, ended.errors) == (0, "")
    folder = tmp_path / "studies" / "quick"
    assert str(folder / "main.md") in ended.output
    text = (folder / "main.md").read_text()
    result = json.loads((folder / "main.json").read_text())
    policies = {row["labels"]["policy"]: row["metrics"] for row in result["rows"]}
    assert set(policies) == {"lemix", "round_robin", "separate:split=training_rate", "bound"}
    bound = policies.pop("bound")
    for metrics in policies.values():
        assert metrics["batches_applied_share"] == 1.0
        assert 0 < metrics["slo_attainment"] <= bound["slo_attainment"]
        assert metrics["tasks_per_node_s"] <= bound["tasks_per_node_s"]
        assert metrics["ttft_mean_s"] >= bound["ttft_mean_s"]
        assert metrics["training_tokens_per_s"] <= bound["training_tokens_per_s"]
    assert "| every accepted training batch is applied in the end (all policies) | met | 3 | 3 |" in text
    assert len(result["verdicts"]) == text.partition("## Verdicts")[2].partition("\n## ")[0].count("\n|") - 2
    figures = sorted(path.name for path in folder.glob("*.png"))
    assert len(figures) == 3
    assert all(f"![{name}]({name})" in text for name in figures)
    assert len((tmp_path / "studies" / "main-quick.jsonl").read_text().splitlines()) == len(result["rows"])


def test_a_quick_frontier_says_how_many_nodes_each_policy_needs(tmp_path: Path) -> None:
    ended = lemix_here("study", "frontier", "--quick", "--runs-dir", str(tmp_path))
    assert (ended.status, ended.errors) == (0, "")
    text = (tmp_path / "studies" / "quick" / "frontier.md").read_text()
    head, _, line = text.partition("## Devices saved: the fewest nodes\n\n")[2].splitlines()[:3]
    nodes = dict(zip(head.split(" | "), line.split(" | "), strict=True))
    needed = [int(nodes[policy]) for policy in ("**lemix**", "least_loaded", "round_robin", "separate")]
    assert int(nodes["bound"]) <= min(needed)
    assert max(needed) <= 3, "what a quick search tries"
    log = (tmp_path / "studies" / "frontier-quick.jsonl").read_text()
    runs = [json.loads(line) for line in log.splitlines()]
    tried = {
        run["labels"]["nodes"]: run["metrics"] for run in runs if run["labels"]["policy"] == "round_robin"
    }
    assert [count for count, metrics in sorted(tried.items()) if metrics["slo_attainment"] >= 0.95] == [
        needed[2]
    ]


@pytest.mark.parametrize("name", ["overload", "unlike", "failures"])
def test_a_quick_study_of_hard_times_measures_every_policy(name: str, tmp_path: Path) -> None:
    ended = lemix_here("study", name, "--quick", "--runs-dir", str(tmp_path))
    assert (ended.status, ended.errors) == (0, "")
    result = json.loads((tmp_path / "studies" / "quick" / f"{name}.json").read_text())
    rows = [row for row in result["rows"] if row["labels"]["policy"] != "bound"]
    assert {"lemix"} < {row["labels"]["policy"] for row in rows}
    for row in rows:
        assert row["metrics"]["in_time_per_s"] > 0
        assert row["metrics"]["batches_applied_share"] == 1.0


def test_recorded_requests_are_studied_from_a_file(tmp_path: Path) -> None:
    trace = tmp_path / "mine.csv"
    trace.write_text("timestamp,prompt_tokens,output_tokens\n" + "".join(f"{at},40,4\n" for at in range(9)))
    ended = lemix_here("study", "trace", "--trace", str(trace), "--quick", "--runs-dir", str(tmp_path))
    assert (ended.status, ended.errors) == (0, "")
    text = (tmp_path / "studies" / "quick" / "trace.md").read_text()
    assert "The first 9 requests of mine.csv" in text
    assert str(tmp_path) not in text
    refused = lemix_here("study", "main", "--trace", str(trace), "--quick", "--runs-dir", str(tmp_path))
    assert "study main draws its requests" in refused.errors
    missing = lemix_here("study", "trace", "--quick", "--runs-dir", str(tmp_path))
    assert "study trace needs --trace FILE" in missing.errors


def test_an_unknown_study_is_one_clear_line(tmp_path: Path) -> None:
    ended = lemix_here("study", "best", "--runs-dir", str(tmp_path))
    assert ended.status == 1
    assert ended.errors.startswith("error: study 'best' is unknown; choose one of: frontier, overload")
    assert ended.errors.count("\n") == 1


def test_a_plan_says_how_many_nodes_a_load_needs() -> None:
    load = ("--profile", "gpt2-small@rtx6000ada", "--rate", "400", "--training", "20000")
    ended = lemix_here("plan", *load, "--in-time", "0.95", "--requests", "40", "--most-nodes", "4")
    assert (ended.status, ended.errors) == (0, "")
    assert "nodes of gpt2-small@rtx6000ada under lemix: 400 requests/s, 20000 training" in ended.output
    assert "of the training kept" in ended.output
