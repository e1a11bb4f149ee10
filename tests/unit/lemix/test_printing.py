"""Output on terminals of any width, in pipes, and into a pipe that nobody reads."""

import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

from lemix.printing import new_table, print_table

TITLE = "run demo, a title that is longer than the rows of an empty table"
HEADINGS = ("node", "version", "reason")
ROW = ("0", "v123456", "the reason why it was rejected")


def printed(width: int, *, is_terminal: bool, rows: tuple[tuple[str, ...], ...] = (ROW,)) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=is_terminal, color_system=None)
    table = new_table(TITLE)
    for heading in HEADINGS:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    print_table(console, table)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [10, 40, 200])
def test_a_pipe_gets_each_row_in_one_line(width: int) -> None:
    lines = printed(width, is_terminal=False)
    assert [line.split() for line in lines if "v123456" in line] == [["0", "v123456", *ROW[2].split()]]


@pytest.mark.parametrize("rows", [(), (ROW,)])
@pytest.mark.parametrize("width", [10, 40, 200])
def test_a_pipe_gets_the_title_in_one_line(width: int, rows: tuple[tuple[str, ...], ...]) -> None:
    title, headings, *_ = filter(None, printed(width, is_terminal=False, rows=rows))
    assert (title, headings.split()) == (TITLE, list(HEADINGS))


@pytest.mark.parametrize("width", [10, 20, 30])
def test_a_narrow_terminal_breaks_texts_between_words_and_cuts_nothing(width: int) -> None:
    lines = printed(width, is_terminal=True)
    words = [word for line in lines for word in line.split()]
    assert not any("…" in word for word in words)
    assert {*TITLE.split(), *HEADINGS, *ROW[1].split(), *ROW[2].split()} <= set(words)


def test_a_reader_who_stops_reading_ends_the_command_quietly() -> None:
    """As `lemix ... | head` does: the pipe's other end is closed while the command still writes."""
    program = (
        "from lemix import cli\n"
        "from lemix.printing import Output, say\n"
        "cli.app = lambda: [say(Output(), 'x' * 1000) for _ in range(1000)]\n"
        "cli.main()"
    )
    reading, writing = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    os.read(reading, 10)
    os.close(reading)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (1, b"")
