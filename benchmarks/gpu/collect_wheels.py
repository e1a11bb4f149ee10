"""Gather wheels for a machine with a card that reaches no package index.

    python -m benchmarks.gpu.collect_wheels FOLDER [--python 3.12] [--there NAME ...]

Everything that is installed here and that LeMix and its tests need, in the same versions, but torch and what
only torch needs: that machine has its own. `--there`: packages that it has, too, in a version that will do.
"""

import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOTS = ("lemix", "pytest", "pytest-asyncio", "hypothesis")
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in range(39, 16, -1)),
    *("manylinux2014_x86_64", "manylinux1_x86_64"),
)
"""pip matches each of them exactly."""
TORCH = "torch"
BUILT_HERE = {"nkeys"}
"""Python alone, and published as source only."""


def needed(there: Iterable[str], environment: dict[str, str]) -> dict[str, str]:
    """Names and versions of the packages to bring."""
    known = {canonicalize_name(name) for name in (*there, TORCH)}
    found: dict[str, str] = {}
    names = list(ROOTS)
    while names:
        name = canonicalize_name(names.pop())
        if name in known:
            continue
        known.add(name)
        try:
            package = distribution(name)
        except PackageNotFoundError:  # of another platform or Python
            continue
        found[name] = package.version
        requirements = [Requirement(line) for line in package.requires or ()]
        names += [one.name for one in requirements if one.marker is None or one.marker.evaluate(environment)]
    del found["lemix"]
    return found


def main() -> None:
    parser = ArgumentParser("python -m benchmarks.gpu.collect_wheels", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="that machine's, 3.12 unless given")
    parser.add_argument("--there", nargs="*", default=[], metavar="NAME")
    chosen = parser.parse_args()
    packages = needed(chosen.there, {"python_version": chosen.python, "extra": ""})
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    pinned = {name: f"{name}=={version}" for name, version in packages.items()}
    pip = (sys.executable, "-m", "pip")
    subprocess.run(
        [
            *(*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:"),
            *("--implementation", "cp", "--python-version", chosen.python, *platforms),
            *("--dest", str(chosen.folder)),
            *(line for name, line in pinned.items() if name not in BUILT_HERE),
        ],
        check=True,
    )
    if built := [line for name, line in pinned.items() if name in BUILT_HERE]:
        into = ("--wheel-dir", str(chosen.folder))
        subprocess.run([*pip, "wheel", "--quiet", "--no-deps", *into, *built], check=True)
    print(f"{len(packages)} packages in {chosen.folder}")


if __name__ == "__main__":
    main()
