"""Two hosts on one machine: this network namespace and another, joined by a wire, without common memory."""

import asyncio
import os
import shlex
import shutil
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ENDED_WITHIN_S = 10.0


@dataclass(frozen=True, slots=True)
class TwoHosts:
    """`here` and `there` are their addresses."""

    name: str
    here: str
    there: str

    @asynccontextmanager
    async def service(
        self, package: str, environment: Mapping[str, str], log: Path, *, is_there: bool
    ) -> AsyncIterator[None]:
        """A service of ours on one of the two while the block runs; its output goes to `log`."""
        command = shlex.join((sys.executable, "-m", f"services.{package}"))
        alone = f"mount -t tmpfs none /dev/shm && exec {command}"
        inside = ("ip", "netns", "exec", self.name) if is_there else ()
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *(*inside, "sh", "-c", alone if is_there else f"exec {command}"),
                env={**os.environ, **environment},
                stdout=output,
                stderr=output,
            )
        try:
            yield
        finally:
            process.terminate()
            async with asyncio.timeout(ENDED_WITHIN_S):
                await process.wait()

    async def cut(self, *, spared_port: int) -> None:
        """End all connections between the two, but those to a port here; new ones can be made."""
        ended = await output_of(
            *("ss", "--kill", "--no-header", "--tcp", "dst", self.there),
            *("and", "sport", "!=", f":{spared_port}"),
        )
        if not ended.strip():
            pytest.skip("all went well until here, where this kernel cannot end a connection (ss --kill)")


@asynccontextmanager
async def two_hosts() -> AsyncIterator[TwoHosts]:
    """Skips the test where nobody may make network namespaces."""
    if missing := [program for program in ("ip", "ss") if shutil.which(program) is None]:
        pytest.skip(f"there is no program {missing[0]} here")
    pid = os.getpid()
    network = f"198.{18 + pid // 256 % 2}.{pid % 256}"  # a range that is set aside for tests
    hosts = TwoHosts(name=f"lemix-{pid}", here=f"{network}.1", there=f"{network}.2")
    try:
        await output_of("ip", "netns", "add", hosts.name)
    except OSError as error:
        pytest.skip(f"no network namespaces here: {error}")
    try:
        await _join(hosts, f"lemix{pid}")
        yield hosts
    finally:
        await output_of("ip", "netns", "del", hosts.name)


async def _join(hosts: TwoHosts, interface: str) -> None:
    there = ("-n", hosts.name)
    wire = ("link", "add", interface, "type", "veth", "peer", "name", "veth0", "netns", hosts.name)
    await output_of("ip", *wire)
    await output_of("ip", "addr", "add", f"{hosts.here}/24", "dev", interface)
    await output_of("ip", "link", "set", interface, "up")
    await output_of("ip", *there, "addr", "add", f"{hosts.there}/24", "dev", "veth0")
    for each in ("veth0", "lo"):
        await output_of("ip", *there, "link", "set", each, "up")


async def output_of(*command: str) -> str:
    """Run a command; returns what it prints. Raises OSError, with what it complained of, when it fails."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, complaints = await process.communicate()
    if process.returncode:
        raise OSError(f"{shlex.join(command)}: {complaints.decode().strip()}")
    return output.decode()
