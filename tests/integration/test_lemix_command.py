"""The command `lemix` as a person runs it: `lemix up` and what it leaves behind, and clear errors."""

import asyncio
import json
import re
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from lemix.arenas import default_base
from lemix.client import ApiClient, served_model
from lemix.summary import Summary
from tests.support.command import Ended, lemix_here
from tests.support.processes import marked_with

LEMIX = (str(Path(sys.executable).with_name("lemix")),)
START_DEADLINE_S = 120.0
COMMAND_DEADLINE_S = 180.0


@pytest.fixture(autouse=True)
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """On every process that a test starts, directly or not."""
    monkeypatch.setenv("LEMIX_TEST_MARK", str(tmp_path))
    monkeypatch.delenv("LEMIX_NATS_URL", raising=False)
    return f"LEMIX_TEST_MARK={tmp_path}"


async def lemix(*arguments: str, standard_input: bytes = b"") -> Ended:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*LEMIX, *arguments, stdin=pipe, stdout=pipe, stderr=pipe)
    async with asyncio.timeout(COMMAND_DEADLINE_S):
        output, errors = await process.communicate(standard_input)
    return Ended(status=process.returncode, output=output.decode(), errors=errors.decode())


class Running:
    """A `lemix up` that has said that it is ready."""

    def __init__(self, process: asyncio.subprocess.Process, output: list[str]) -> None:
        self.process = process
        self.output = output
        found = re.search(r"http://[\d.:]+", "".join(output))
        assert found is not None
        self.api_url = found[0]

    async def interrupt(self) -> Ended:
        """Ctrl-C, and what comes of it."""
        self.process.send_signal(signal.SIGINT)
        async with asyncio.timeout(COMMAND_DEADLINE_S):
            output, errors = await self.process.communicate()
        return Ended(status=self.process.returncode, output=output.decode(), errors=errors.decode())


@asynccontextmanager
async def lemix_up(folder: Path) -> AsyncIterator[Running]:
    size = ("--nodes", "1", "--stages", "2", "--stages-per-worker", "2")
    arguments = ("up", *size, "--port", "0", "--runs-dir", str(folder))
    process = await asyncio.create_subprocess_exec(
        *LEMIX, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    output: list[str] = []
    try:
        async with asyncio.timeout(START_DEADLINE_S):
            while not any("Ctrl-C" in line for line in output):
                line = (await process.stdout.readline()).decode()
                assert line, "lemix up ended before it was ready: " + "".join(output)
                output.append(line)
        yield Running(process, output)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def status_of_example(output: Sequence[str]) -> int:
    """Send the request that `lemix up` shows; what comes back."""
    (line,) = [line for line in output if line.startswith("try:  ")]
    _, curl, url, *rest = shlex.split(line)
    assert curl == "curl" and url.endswith("/v1/chat/completions")
    async with httpx.AsyncClient(timeout=20) as http:
        return (await http.post(url, json=json.loads(rest[-1]))).status_code


async def publish_and_look(runs_dir: Path) -> None:
    """`lemix train publish`, from a file and from a pipe, and `lemix status`: they find the only cluster."""
    file = runs_dir / "batches.jsonl"
    file.write_text(
        '{"id": "one", "examples": [{"text": "Sea calm."}]}\n{"examples": [{"text": "Wind west."}]}\n'
    )
    published = await lemix("train", "publish", str(file), "--runs-dir", str(runs_dir))
    assert (published.status, published.errors) == (0, "")
    assert published.output == "run default: 2 batches stored, as 1 and 2\n"
    again = await lemix("train", "publish", str(file), "--runs-dir", str(runs_dir))
    stored, repeated = again.output.splitlines()
    assert stored == "run default: 1 batch stored, as 3"
    assert repeated.startswith("run default: 1 batch already stored, as 1: ")
    file.write_text('{"text": "Fog."}\n\n{"token_ids": [1, 999999]}\n')
    refused = await lemix("train", "publish", str(file), "--runs-dir", str(runs_dir))
    assert refused.status == 1 and "line 3: token id 999999 is not in 0.." in refused.errors
    examples = b'{"text": "Rain later."}\r\n{"prompt": "Wind?", "completion": " West."}\r\n'
    from_pipe = ("train", "publish", "-", "--batch-size", "1", "--epochs", "2", "--follow")
    piped = await lemix(*from_pipe, "--runs-dir", str(runs_dir), standard_input=examples)
    stored, trained = piped.output.splitlines()
    assert stored == "run default: 4 batches stored, as 4, 5, 6 and 7", piped.errors
    assert re.fullmatch(r"run default: trained: loss \d\.\d{3} at first, \d\.\d{3} in the end", trained)
    status = await lemix("status", "--runs-dir", str(runs_dir))
    assert (status.status, status.errors) == (0, "")
    assert "v7" in status.output
    assert "run default: policy lemix, 1 of 1 nodes ready" in status.output
    assert "0/2" in status.output and "1/2" in status.output


async def test_up_serves_and_trains_and_ctrl_c_ends_it_and_all_it_started(tmp_path: Path, mark: str) -> None:
    async with lemix_up(tmp_path) as running:
        model = await served_model(running.api_url)
        async with ApiClient(running.api_url, model=model) as api:
            completion = await api.complete("Return the", max_tokens=8)
        assert 1 <= completion.completion_tokens <= 8
        assert await status_of_example(running.output) == 200
        await publish_and_look(tmp_path)
        assert len(list(default_base().glob(f"lemix-{running.process.pid}-*"))) == 1
        ended = await running.interrupt()
        assert ended == Ended(status=0, output="", errors=""), "each service ended by itself, in time"
        assert marked_with(mark) == {}
        assert list(default_base().glob(f"lemix-{running.process.pid}-*")) == []
        logs = {log.name: log.read_text() for log in (tmp_path / "default" / "logs").glob("*.log")}
        assert len(logs) == 4, "one worker holds both stages"
        ready = re.compile(r"INFO [\w.-]+: ready: .+\n")
        assert all(ready.fullmatch(text) for text in logs.values()), logs


async def test_the_demo_keeps_its_promises_and_leaves_nothing(tmp_path: Path, mark: str) -> None:
    """A short one; `make demo` runs a minute on two nodes."""
    size = ("--nodes", "1", "--stages", "2", "--seconds", "5", "--batches", "6")
    process = await asyncio.create_subprocess_exec(
        *(*LEMIX, "demo", *size, "--runs-dir", str(tmp_path)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(START_DEADLINE_S * 4):
        output, errors = await process.communicate()
    assert (process.returncode, errors) == (0, b""), output.decode()
    assert b"LeMix demo" in output
    summary = Summary.model_validate_json((tmp_path / "demo" / "summary.json").read_text())
    assert summary.faults() == []
    assert 0 < summary.requests.chat < summary.requests.sent
    assert (tmp_path / "demo" / "demo.png").is_file()
    assert summary.training.batches_applied == 6
    assert summary.served_loss.after < summary.served_loss.before - 0.5
    assert summary.weights_version.last is not None and 0 < summary.weights_version.last <= 6
    assert marked_with(mark) == {}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("status",), r"no LeMix is running under \S+"),
        (("status", "--nats-url", "nats://127.0.0.1:9"), "no connection to NATS at 127.0.0.1:9"),
        (("train", "publish", "absent.jsonl"), "cannot read absent.jsonl"),
        (("up", "--name", "a/b"), "'a/b' is no name of a run"),
        (("up", "--host", "192.0.2.1", "--insecure"), "cannot listen on 192.0.2.1:8000"),
    ],
)
def test_an_error_is_one_clear_line(tmp_path: Path, arguments: tuple[str, ...], error: str) -> None:
    ended = lemix_here(*arguments, "--runs-dir", str(tmp_path))
    assert ended.status == 1
    assert re.match(f"error: {error}", ended.errors), ended.errors
    assert ended.errors.count("\n") == 1


def test_a_line_that_is_not_json_is_named_and_nothing_published(tmp_path: Path) -> None:
    file = tmp_path / "batches.jsonl"
    file.write_text('{"examples": [{"text": "a"}]}\nnot json\n')
    ended = lemix_here("train", "publish", str(file), "--nats-url", "nats://127.0.0.1:9")
    assert ended.status == 1
    assert "line 2: not JSON" in ended.errors
