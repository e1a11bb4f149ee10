"""Documents that say what settings and parameters there are, against the code."""

import re
import tomllib
from pathlib import Path

import pytest

from services.gateway.jobs.requests import HyperparametersAsked, JobRequest
from services.gateway.openai.requests import CompletionRequest
from services.gateway.settings import GatewaySettings
from services.scheduler.settings import SchedulerSettings
from services.stage_worker.settings import StageWorkerSettings
from services.trainer.settings import TrainerSettings
from shared import subjects
from shared.settings import LemixSettings

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "settings",
    [GatewaySettings, SchedulerSettings, StageWorkerSettings, TrainerSettings],
    ids=lambda s: s.__name__,
)
def test_every_setting_is_in_the_operations_document(settings: type[LemixSettings]) -> None:
    document = (ROOT / "docs" / "operations.md").read_text()
    missing = [name for name in settings.model_fields if f"`LEMIX_{name.upper()}`" not in document]
    assert missing == []


def test_every_parameter_of_the_api_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    fields = [*CompletionRequest.model_fields, *JobRequest.model_fields, *HyperparametersAsked.model_fields]
    assert [name for name in fields if f"`{name}" not in readme] == []


def test_every_promise_of_the_readme_names_files_of_tests() -> None:
    _, _, promises = (ROOT / "README.md").read_text().partition("| promise | tests |\n|---|---|\n")
    rows = [row.split("|") for row in promises.partition("\n\n")[0].splitlines()]
    assert len(rows) > 5
    for _, promise, tests, _ in rows:
        files = re.findall(r"`(tests/[^`]*)`", tests)
        assert files, f"nothing holds the promise: {promise}"
        assert [file for file in files if not (ROOT / file).is_file()] == []


@pytest.mark.parametrize(
    "topic",
    [topic for topic in vars(subjects).values() if isinstance(topic, subjects.Topic | subjects.RequestTopic)],
    ids=lambda topic: topic.pattern,
)
def test_every_subject_is_in_the_protocol(topic: subjects.Topic | subjects.RequestTopic) -> None:  # type: ignore[type-arg]
    rows = (ROOT / "docs" / "protocol.md").read_text().splitlines()
    (row,) = [row for row in rows if row.startswith(f"| `{topic.pattern}` |")]
    names = [topic.message.__name__, *([topic.reply.__name__] if hasattr(topic, "reply") else [])]
    assert re.findall(r"`(\w+)`", row) == names
    assert topic.meaning.rpartition(": ")[2] in row


@pytest.mark.parametrize("subject", [subjects.BATCHES, subjects.REJECTED])
def test_every_durable_subject_is_in_the_protocol(subject: str) -> None:
    assert f"| `{subject}` |" in (ROOT / "docs" / "protocol.md").read_text()


def test_every_dependency_has_a_tested_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    tested = (ROOT / "constraints.txt").read_text()
    assert {_package(line) for line in wanted} - {_package(line) for line in tested.splitlines()} == set()


def _package(requirement: str) -> str:
    """Its name, as indexes compare names."""
    return re.split(r"[<>=]", requirement)[0].strip().lower().replace("_", "-")
