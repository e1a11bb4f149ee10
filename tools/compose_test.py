"""`make compose-test`: compose.yaml on a real Docker engine, from the build to `down`; writes what it saw.

It needs ports 8000 and 4222, and takes about ten minutes. It removes what it makes, but for the image.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).parents[1]
PROJECT = "lemix-compose-test"
API = "http://127.0.0.1:8000"
PATIENCE_S = 300.0
MEASURED_S = 60.0
BUSY_S = 180.0
MAX_IMAGE_BYTES = 1_200_000_000
MAX_LAYER_BYTES = 30_000_000
ENGINE = ("dockerd", "containerd")
"""What the engine's processes are called: a check is made by them, and is their child."""
BATCH = b'{"id": "%s", "examples": [{"text": "Sea weather for the north: wind from the west, calm."}]}\n'
CHAT = {"model": "embedded", "messages": [{"role": "user", "content": "Return the"}], "max_tokens": 8}


class Failed(Exception):
    """Something did not go as it should."""


class Transcript:
    """What was done and seen, for people; the seconds are those since the beginning."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._begun_s = time.monotonic()

    def say(self, line: str) -> None:
        text = f"[{time.monotonic() - self._begun_s:5.0f} s] {line}"
        print(text, flush=True)
        self._file.write(text + "\n")

    def check(self, what: str, holds: bool) -> None:
        self.say(f"{'ok  ' if holds else 'FAIL'} {what}")
        if not holds:
            raise Failed(what)


def docker(*arguments: str, stdin: bytes = b"", may_fail: bool = False, **environment: str) -> str:
    """What the command printed. Raises Failed with its errors."""
    done = subprocess.run(
        ["docker", *arguments], input=stdin, capture_output=True, cwd=ROOT, env=os.environ | environment
    )
    if done.returncode != 0 and not may_fail:
        raise Failed(f"docker {' '.join(arguments)}: {done.stderr.decode()[-2000:]}")
    return done.stdout.decode() + (done.stderr.decode() if may_fail else "")


def compose(*arguments: str, stdin: bytes = b"", may_fail: bool = False, **environment: str) -> str:
    return docker("compose", "-p", PROJECT, *arguments, stdin=stdin, may_fail=may_fail, **environment)


def lemix(*arguments: str, stdin: bytes = b"") -> str:
    """A command of `lemix`, in a container of its own."""
    return compose("run", "--rm", "-T", "lemix", *arguments, stdin=stdin).strip()


def ask(path: str, body: object = None, key: str = "") -> tuple[int, bytes]:
    """Status and body of the API's answer; status 0: there was none."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(API + path, data, headers), timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return 0, b""


def until(holds: Callable[[], bool], what: str) -> float:
    """Wait; returns the seconds it took. Raises Failed after PATIENCE_S."""
    begun_s = time.monotonic()
    while not holds():
        if time.monotonic() - begun_s > PATIENCE_S:
            raise Failed(f"{what}: not within {PATIENCE_S:g} s")
        time.sleep(1)
    return time.monotonic() - begun_s


def containers() -> dict[str, str]:
    """Each running container of the project, and its health."""
    listed = compose("ps", "--format", "{{.Service}} {{.Health}}").splitlines()
    return {name: health for name, _, health in (line.partition(" ") for line in listed)}


def are_well() -> bool:
    seen = [health for health in containers().values() if health]
    return len(seen) == 8 and set(seen) == {"healthy"}


def engine_s() -> float:
    """Seconds of a processor that the engine and what it has started for itself have taken."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        if text[text.index("(") + 1 :].startswith(ENGINE):
            ticks += sum(map(int, text.rpartition(")")[2].split()[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def engine_share(seconds: float) -> float:
    """The share of one core that the engine takes while nothing but health checks is asked of it."""
    before = engine_s()
    time.sleep(seconds)
    return (engine_s() - before) / seconds


def build(say: Transcript) -> None:
    begun_s = time.monotonic()
    compose("build")
    size = int(docker("image", "inspect", "lemix", "--format", "{{.Size}}"))
    say.say(f"docker compose build: {time.monotonic() - begun_s:.0f} s")
    say.check(f"the image has {size / 1e6:,.0f} MB, at most 1,200", size <= MAX_IMAGE_BYTES)
    libraries = "import pathlib, torch; print(*pathlib.Path(torch.__file__).parent.glob('lib/*cuda*'))"
    say.check("no CUDA in it", not docker("run", "--rm", "lemix", "python", "-c", libraries).strip())


def rebuild(say: Transcript) -> None:
    """Build a copy of the sources with one file changed."""
    with tempfile.TemporaryDirectory() as folder:
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        for name in filter(None, tracked.decode().split("\0")):
            if (ROOT / name).is_file():
                target = Path(folder) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, target)
        with (Path(folder) / "services/scheduler/service.py").open("a") as changed:
            changed.write("# changed\n")
        begun_s = time.monotonic()
        compose("--project-directory", folder, "-f", f"{folder}/compose.yaml", "build")
    took_s = time.monotonic() - begun_s
    newest = docker("history", "lemix", "--format", "{{.Size}} {{.CreatedBy}}", "--human=false").splitlines()
    layer = next(int(line.split()[0]) for line in newest if int(line.split()[0]) > 0)
    say.say(f"docker compose build after a change of one source file: {took_s:.0f} s")
    say.check(f"it made one layer, of {layer / 1e6:.1f} MB", layer < MAX_LAYER_BYTES)


def start(say: Transcript) -> None:
    begun_s, before_s = time.monotonic(), engine_s()
    compose("up", "-d")
    say.say(f"docker compose up: containers started after {time.monotonic() - begun_s:.0f} s")
    until(are_well, "all containers healthy")
    say.check(f"healthy after {time.monotonic() - begun_s:.0f} s", True)
    say.say(f"the engine took {engine_s() - before_s:.1f} s of a core for starting and checking them")
    for line in compose("--ansi", "never", "logs", "--no-color", "--no-log-prefix").splitlines():
        if "ready:" in line or "WARNING" in line:
            say.say(f"     {line}")
    well = ("/health", "/health/ready", "/health/live")
    say.check(f"GET {', '.join(well)}: 200", all(ask(path)[0] == 200 for path in well))


def use(say: Transcript) -> str:
    """Make a key and ask with it; returns it."""
    say.check("without keys this machine's chat is answered", ask("/v1/chat/completions", CHAT)[0] == 200)
    key = lemix("keys", "create", "--name", "someone").split()[-1]
    until(lambda: ask("/v1/chat/completions", CHAT)[0] == 401, "a key is needed")
    say.check("once there is a key: 401 without one", True)
    status, body = ask("/v1/chat/completions", CHAT, key)
    say.check(f"200 with it: {json.loads(body)['choices'][0]['message']['content']!r}", status == 200)
    return key


def train(say: Transcript, name: str) -> None:
    told = lemix("train", "publish", "--follow", "-", stdin=BATCH % name.encode())
    say.check(f"batch {name}: {' '.join(told.split())[-110:]}", "1 batch" in told)


def survive(say: Transcript, key: str) -> None:
    """Restarts and a kill, each followed by an answer and a batch."""

    def answers(what: str) -> None:
        took_s = until(lambda: ask("/v1/chat/completions", CHAT, key)[0] == 200, f"an answer after {what}")
        say.check(f"after {what}: a chat answer {took_s:.0f} s later", True)

    compose("restart", "trainer")
    answers("restart trainer")
    train(say, "second")
    compose("restart", "nats")
    answers("restart nats")
    train(say, "third")
    compose("exec", "-T", "node-0-stage-1", "sh", "-c", "kill -KILL -1", may_fail=True)
    answers("kill -KILL of node-0-stage-1")
    took_s = until(are_well, "all containers healthy again")
    say.check(f"the stage was started again, and all are healthy {took_s:.0f} s later", True)
    train(say, "fourth")


def mistake(say: Transcript) -> None:
    told = compose("run", "--rm", "-T", "-e", "LEMIX_LOG_LEVEL=LOUD", "scheduler", may_fail=True)
    ours = [line for line in told.splitlines() if "LEMIX" in line or "Traceback" in line]
    say.check(f"a wrong setting is one line: {ours}", len(ours) == 1 and "LOUD" in ours[0])
    confined = compose("exec", "-T", "gateway", "sh", "-c", "id -u; touch /app/x", may_fail=True)
    say.check(f"confined: {' '.join(confined.split())[:80]}", "10001" in confined and "Read-only" in confined)


def measure(say: Transcript) -> None:
    say.say(
        f"idle: the engine takes {engine_share(MEASURED_S):.2%} of one core for the checks of all containers"
    )
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        time.sleep(BUSY_S)
        say.check(f"all cores busy with something else for {BUSY_S:g} s: all are healthy", are_well())
    finally:
        for process in busy:
            process.kill()
            process.wait()


def run(say: Transcript) -> None:
    for line in ("docker version --format {{.Server.Version}}", "docker compose version --short"):
        say.say(f"{line}: {docker(*line.split()[1:]).strip()}")
    say.say(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the start")
    build(say)
    try:
        start(say)
        key = use(say)
        train(say, "first")
        survive(say, key)
        mistake(say)
        measure(say)
    finally:
        compose("down", "--volumes", "--timeout", "15")
    left = compose("ps", "--all", "--quiet") + docker("volume", "ls", "-q", "--filter", f"name={PROJECT}")
    say.check("docker compose down: nothing is left", not left.strip())
    rebuild(say)


def main() -> None:
    with Path(sys.argv[1]).open("w") as file:
        try:
            run(Transcript(file))
        except Failed as error:
            file.write(f"FAIL {error}\n")
            sys.exit(f"FAIL {error}")


if __name__ == "__main__":
    main()
