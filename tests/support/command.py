"""The command `lemix` in the test's own process: as its entry point runs it, but without a start."""

import contextlib
import io
import sys
from dataclasses import dataclass
from unittest.mock import patch

from lemix.cli import main


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended."""

    status: int | str | None
    output: str
    errors: str


def lemix_here(*arguments: str) -> Ended:
    """Run `lemix ARGUMENTS` to its end. Not from a coroutine: commands run a loop of their own."""
    output, errors = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["lemix", *arguments]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            main()
        except SystemExit as ended:
            return Ended(status=ended.code, output=output.getvalue(), errors=errors.getvalue())
    return Ended(status=0, output=output.getvalue(), errors=errors.getvalue())
