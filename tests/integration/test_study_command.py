"""`lemix study` as a person runs it: the quick form of the main study, from end to end."""

import asyncio
import json
import sys
from pathlib import Path

LEMIX = str(Path(sys.executable).with_name("lemix"))
DEADLINE_S = 120.0


async def study(*arguments: str) -> tuple[int | None, str, str]:
    """Exit status, output, errors."""
    process = await asyncio.create_subprocess_exec(
        LEMIX, "study", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(DEADLINE_S):
        output, errors = await process.communicate()
    return process.returncode, output.decode(), errors.decode()


async def test_a_quick_study_leaves_table_verdicts_figures_and_its_runs(tmp_path: Path) -> None:
    status, output, errors = await study("main", "--quick", "--runs-dir", str(tmp_path))
    assert (status, errors) == (0, "")
    folder = tmp_path / "studies" / "quick"
    assert str(folder / "main.md") in output
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


async def test_an_unknown_study_is_one_clear_line(tmp_path: Path) -> None:
    status, _, errors = await study("best", "--runs-dir", str(tmp_path))
    assert status == 1
    assert errors.startswith("error: study 'best' is unknown; choose one of: main, heterogeneity")
    assert errors.count("\n") == 1
