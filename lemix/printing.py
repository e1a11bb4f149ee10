"""Lines and tables for whoever runs a command, on a terminal of any width or in a pipe."""

import os
import sys
from typing import NoReturn

from rich import box
from rich.console import Console
from rich.table import Table

from shared.errors import LemixError

UNLIMITED_COLUMNS = 100_000


class ReaderGoneError(LemixError):
    """Whoever read the output has stopped reading: `lemix status | head -4`."""


class Output(Console):
    """Standard output. Raises ReaderGoneError when nobody reads it any more."""

    def on_broken_pipe(self) -> NoReturn:
        """Also what Python flushes when it ends then goes nowhere."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ReaderGoneError("nobody reads standard output")


def say(console: Console, line: str) -> None:
    """One line as it is: never wrapped, never styled."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def say_error(message: str) -> None:
    """One line on standard error."""
    say(Console(stderr=True), f"error: {message}")


def new_table(title: str) -> Table:
    """The look that all tables have."""
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def print_table(console: Console, table: Table) -> None:
    """Nothing is cut: a narrow terminal wraps the lines, a pipe gets the title and each row in one line."""
    if table.title:
        console.print(table.title, style="table.title", highlight=False, soft_wrap=not console.is_terminal)
        table.title = None
    needed = console.measure(table, options=console.options.update(max_width=UNLIMITED_COLUMNS))
    table.width = max(console.width, needed.minimum) if console.is_terminal else needed.maximum
    console.print(table, crop=False)
