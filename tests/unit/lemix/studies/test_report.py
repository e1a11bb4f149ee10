import json
from collections.abc import Sequence
from pathlib import Path

from lemix.studies.charts import chart_by
from lemix.studies.command import StudyOptions
from lemix.studies.grid import Report, Section
from lemix.studies.measures import SLO_ATTAINMENT
from lemix.studies.report import write
from lemix.studies.rows import Row, Spread
from lemix.studies.verdicts import Finding, Verdict
from tests.unit.lemix.studies.support import cell_of, study_of

ROWS = [
    Row({"rate": 4, "policy": "lemix"}, {"slo_attainment": Spread(0.123456789, 0.1, 0.2)}, 5),
    Row({"rate": 4, "policy": "bound"}, {"slo_attainment": Spread(0.75, 0.75, 0.75)}, 5),
]
MISS = Finding({"rate": 4}, 0.12, 0.5, False, "random", "slo_attainment")


def made_up_report(rows: Sequence[Row]) -> Report:
    return Report(
        sections=[Section(title="A table", body="| a |")],
        verdicts=[Verdict("half of all", (MISS,))],
        charts={"by-rate": chart_by(rows, "rate", [SLO_ATTAINMENT])},
    )


def test_a_study_says_all_in_markdown_and_json_and_figures(tmp_path: Path) -> None:
    study = study_of([cell_of("lemix", seed=seed) for seed in (3, 4)], report=made_up_report)
    path = write(study, ROWS, tmp_path / "new", command="lemix study made-up", made="Code: a1b2.")
    text = path.read_text()
    assert text.startswith("# Made up\n\nNothing runs.\n\n## Verdicts\n")
    assert "## A table\n\n| a |\n" in text
    assert "| rate 4 | 0.120 | 0.500 (random) | 0.750: permitted |" in text
    assert "Made by `lemix study made-up`. Seeds 3, 4; 10 of 2 runs." in text
    assert "shorter. Code: a1b2.\n" in text
    assert "![made-up-by-rate.png](made-up-by-rate.png)" in text
    assert (path.parent / "made-up-by-rate.png").exists()
    result = json.loads((path.parent / "made-up.json").read_text())
    assert result["rows"][0]["metrics"]["slo_attainment"] == [0.123457, 0.1, 0.2]
    assert result["verdicts"][0]["missed"][0]["needed"] == 0.5


def test_only_a_full_study_goes_to_the_documents() -> None:
    assert StudyOptions(name="main").folder == Path("docs/studies")
    assert StudyOptions(name="main", quick=True).folder == Path("runs/studies/quick")
    assert StudyOptions(name="main", quick=True, output=Path("here")).folder == Path("here")
    full, quick = (StudyOptions(name="main", quick=quick, runs_dir=Path("r")).log for quick in (False, True))
    assert (full, quick) == (Path("r/studies/main.jsonl"), Path("r/studies/main-quick.jsonl"))
