"""How we write: documents in short sentences, and docstrings that say what a thing does."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
ROOMS = ("services", "shared", "lemix", "benchmarks", "tests/support")
CODE = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
MAX_SENTENCE_WORDS = 40
MAX_README_WORDS = 1000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_sentences_are_short_enough_to_be_read_once(page: Path) -> None:
    long = [s for s in sentences(page.read_text(encoding="utf-8")) if len(s.split()) > MAX_SENTENCE_WORDS]
    assert long == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= MAX_README_WORDS


def test_docstrings_begin_with_what_the_thing_does_or_is() -> None:
    unclear = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in CODE
        for line, text in docstrings(path.read_text(encoding="utf-8"))
        if re.match(r"(Of|What)\b", text)
    ]
    assert unclear == []


def sentences(markdown: str) -> Iterator[str]:
    """The sentences of paragraphs and list items; code blocks, tables and headings are left out."""
    prose = re.sub(r"^ *```.*?^ *```$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    lines = [line for line in prose.splitlines() if not re.match(r"\s*(\||#|!\[)", line)]
    for block in re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) ", "\n".join(lines)):
        yield from (part.strip() for part in re.split(r"(?<=[.!?])\s|(?<=[.!?]\))\s", block) if part.strip())


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every string that documents a module, a class, a function, a field or a constant."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text)), lineno=line):
                yield line, text.strip()


def test_sentences_end_where_paragraphs_items_and_full_stops_do() -> None:
    page = "# No\n\nOne, two.\nThree `a.b`: four\n\n- five\n- six (seven.) Eight\n\n| no |\n\n```\nno\n```\n"
    assert list(sentences(page)) == ["One, two.", "Three `a.b`: four", "- five", "six (seven.)", "Eight"]


def test_every_kind_of_docstring_is_found() -> None:
    source = '"""module"""\nA = 1\n"""constant"""\nclass C:\n    """class"""\n    x: int\n    """field"""\n\n'
    source += '    def f(self):\n        """method"""\n        return "no"\n'
    found = sorted(text for _, text in docstrings(source))
    assert found == ["class", "constant", "field", "method", "module"]
