"""Documents that say what settings and parameters there are, against the code."""

import re
import tomllib
from math import inf
from pathlib import Path

import pytest

from services.gateway.jobs.requests import DpoHyperparametersAsked, JobRequest
from services.gateway.openai.chat.request import ChatRequest
from services.gateway.openai.completions.request import CompletionRequest
from services.gateway.settings import GatewaySettings
from services.scheduler.settings import SchedulerSettings
from services.stage_worker.settings import StageWorkerSettings
from services.trainer.settings import TrainerSettings
from shared import subjects
from shared.settings import EMBEDDED_MODEL, LemixSettings

ROOT = Path(__file__).parents[3]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "lemix").rglob("*.md")]
SERVICES: dict[str, type[LemixSettings]] = {
    "gateway": GatewaySettings,
    "scheduler": SchedulerSettings,
    "stages": StageWorkerSettings,
    "trainer": TrainerSettings,
}


def test_the_table_of_settings_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| `LEMIX_(\w+)`(?: \*)? \| ([^|]+) \| ([^|]+) \|", _page("settings"), re.MULTILINE)
    told = {name.lower(): (set(readers.split(", ")), default) for name, readers, default in rows}
    assert len(told) == len(rows)
    assert told == {name: (_readers(name), _default(name)) for name in _names(*SERVICES.values())}


def _names(*kinds: type[LemixSettings]) -> set[str]:
    return {name for kind in kinds for name in kind.model_fields}


def _readers(setting: str) -> set[str]:
    if setting in LemixSettings.model_fields:
        return {"all"}
    return {service for service, kind in SERVICES.items() if setting in kind.model_fields}


def _default(setting: str) -> str:
    """As the table writes it. Services that read the same setting default to the same, where any does."""
    fields = [kind.model_fields[setting] for kind in SERVICES.values() if setting in kind.model_fields]
    if any(field.is_required() for field in fields):
        return "required"
    (default,) = {field.default for field in fields}
    if default in ("", None, ()):
        return "none"
    if default == EMBEDDED_MODEL:
        return "the embedded model"
    if isinstance(default, bool):
        return str(default).lower()
    if default == inf:
        return "infinite"
    if isinstance(default, tuple):
        return ",".join(f"{each:g}" for each in default)
    if isinstance(default, int) and setting.endswith("_bytes"):
        return f"{default >> 20} MiB"
    return f"`{default}`" if isinstance(default, str | Path) else str(default).removesuffix(".0")


def test_every_parameter_of_the_api_is_in_its_document() -> None:
    chat, completion = ChatRequest.model_fields, CompletionRequest.model_fields
    fields = [*chat, *completion, *JobRequest.model_fields, *DpoHyperparametersAsked.model_fields]
    assert [name for name in fields if f"`{name}" not in _page("api")] == []


def test_every_promise_names_files_of_tests() -> None:
    rows = [row.split("|") for row in _page("promises").splitlines() if row.startswith("| ")]
    promises = [(promise, tests) for _, promise, tests, _ in rows if promise != " promise "]
    assert len(promises) > 20
    for promise, tests in promises:
        files = re.findall(r"`(tests/[^`]*)`", tests)
        assert files, f"nothing holds the promise: {promise}"
        assert [file for file in files if not (ROOT / file).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_document_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    inside = [link.partition("#") for link in links if "://" not in link]
    assert [file for file, _, _ in inside if file and not (page.parent / file).exists()] == []
    anchors = [(page.parent / file if file else page, anchor) for file, _, anchor in inside if anchor]
    assert [anchor for target, anchor in anchors if anchor not in _anchors(target)] == []


def _anchors(page: Path) -> set[str]:
    """Where the headings of a page can be linked to, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "topic",
    [topic for topic in vars(subjects).values() if isinstance(topic, subjects.Topic | subjects.RequestTopic)],
    ids=lambda topic: topic.pattern,
)
def test_every_subject_is_in_the_protocol(topic: subjects.Topic | subjects.RequestTopic) -> None:  # type: ignore[type-arg]
    rows = _page("protocol").splitlines()
    (row,) = [row for row in rows if row.startswith(f"| `{topic.pattern}` |")]
    names = [topic.message.__name__, *([topic.reply.__name__] if hasattr(topic, "reply") else [])]
    assert re.findall(r"`(\w+)`", row) == names
    assert topic.meaning.rpartition(": ")[2] in row


@pytest.mark.parametrize("subject", [subjects.BATCHES, subjects.REJECTED])
def test_every_durable_subject_is_in_the_protocol(subject: str) -> None:
    assert f"| `{subject}` |" in _page("protocol")


def test_every_dependency_has_a_tested_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {*project["dependencies"], *extras["lab"], *extras["dev"]} - {"lemix[lab]"}
    tested = (ROOT / "constraints.txt").read_text()
    assert {_package(line) for line in wanted} - {_package(line) for line in tested.splitlines()} == set()


def _page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text()


def _package(requirement: str) -> str:
    """Its name, as indexes compare names."""
    return re.split(r"[<>=]", requirement)[0].strip().lower().replace("_", "-")
