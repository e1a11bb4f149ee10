"""What commands of `lemix` do with what a person typed: which run they speak to, what they refuse at once."""

from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lemix import lab_extra
from lemix.cli import app
from shared.bus.access import Access
from shared.bus.nats import NatsBus
from shared.errors import BusError
from tests.unit.lemix.test_run_folder import described

BATCH = '{"id": "a", "examples": [{"text": "one"}]}\n'
ASKING = [
    "status",
    "train publish batches.jsonl",
    "train rejected",
    "weights list",
    "weights rollback 0",
    "lineage 7",
]
"""Commands that speak to a run."""
EXPORT = "weights export 7 exported"
"""Reads the files of a run."""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LEMIX_NATS_URL", raising=False)
    monkeypatch.setattr(NatsBus, "connect", nobody)


async def nobody(url: str, *, name: str, access: Access, timeout_s: float) -> NatsBus:
    raise BusError(f"no connection to {url}")


def lemix(command: str) -> Result:
    return CliRunner().invoke(app, command.split())


def refusal(command: str) -> str:
    refused = lemix(command)
    assert refused.exit_code == 1
    return str(refused.exception)


@pytest.mark.parametrize("command", [*ASKING, EXPORT])
def test_of_two_runs_no_command_guesses_and_each_takes_a_name(command: str) -> None:
    Path("batches.jsonl").write_text(BATCH)
    runs = [described(Path("runs"), name) for name in ("one", "two")]
    assert "2 runs are running under runs/: one (http://one), two (http://two)" in refusal(command)
    place = "runs/two/checkpoints" if command == EXPORT else "no connection to nats://two"
    assert place in refusal(f"{command} --name two")
    for run in runs:
        run.release()


@pytest.mark.parametrize("command", ["up", "demo", "profile"])
@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ("--device foo", "device 'foo' is neither cpu nor cuda:N"),
        ("--device cuda:64", "device 'cuda:64': "),
        ("--model /nope", "model '/nope': there is no such folder"),
        ("--stages 99", "num_stages=99: a model of"),
    ],
)
def test_what_cannot_start_is_refused_in_one_line_before_anything_starts(
    command: str, options: str, fault: str
) -> None:
    told = refusal(f"{command} {options}")
    assert told.startswith(fault)
    assert "\n" not in told
    assert list(Path().iterdir()) == []


def test_a_port_of_nats_is_for_a_server_of_the_runs_own() -> None:
    told = refusal("up --nats-port 4222 --nats-url nats://elsewhere")
    assert told == "nats_port=4222 is for a server of the run's own, and elsewhere:4222 is given"


def test_the_version_is_told() -> None:
    assert lemix("--version").stdout == f"lemix {version('lemix')}\n"


@pytest.mark.parametrize("command", ["demo", "simulate --profile llama2-7b@a100", "study main"])
def test_what_draws_says_what_to_install_where_the_lab_is_not(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab_extra, "PACKAGES", ("matplotlib", "nowhere_to_be_found"))
    assert refusal(command) == "this command draws pictures: pip install 'lemix[lab]' first"
    assert list(Path().iterdir()) == []
