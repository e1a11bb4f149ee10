from pathlib import Path

import pytest

from lemix.simulation.trace import TraceRow, at_rate, read_trace
from shared.errors import ConfigurationError

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109

2023-11-16 18:16:46.6805900,879,55
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_text(text)
    return path


def test_reads_an_azure_trace(tmp_path: Path) -> None:
    rows = read_trace(written(tmp_path, AZURE))
    assert [(row.prompt_tokens, row.output_tokens) for row in rows] == [(374, 44), (396, 109), (879, 55)]
    assert [row.at_s for row in rows] == pytest.approx([0.0, 4.314579, 60.0])


def test_reads_seconds_and_columns_in_any_order(tmp_path: Path) -> None:
    path = written(tmp_path, "output_tokens, timestamp,user,prompt_tokens\n5,10.5,me,7\n6,12,you,8\n")
    assert read_trace(path) == (TraceRow(0.0, 7, 5), TraceRow(1.5, 8, 6))


def test_reads_no_further_than_asked(tmp_path: Path) -> None:
    path = written(tmp_path, "timestamp,prompt_tokens,output_tokens\n0,1,2\n1,3,4\nnonsense\n")
    assert len(read_trace(path, limit=2)) == 2


def test_a_trace_can_be_given_another_rate() -> None:
    rows = (TraceRow(0.0, 1, 1), TraceRow(1.0, 2, 1), TraceRow(4.0, 3, 1))
    # two gaps at 4 per second: half a second in all
    assert [row.at_s for row in at_rate(rows, 4.0)] == [0.0, 0.125, 0.5]
    assert [row.prompt_tokens for row in at_rate(rows, 4.0)] == [1, 2, 3]
    assert at_rate(rows[:1], 4.0) == rows[:1]


HEADER = "timestamp,prompt_tokens,output_tokens\n"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "line 1: no column timestamp"),
        ("timestamp,tokens\n", "line 1: no column prompt_tokens or .* among timestamp, tokens"),
        (HEADER, "holds no request"),
        (HEADER + "0,1,1\n1,one,1\n", "line 3: '1,one,1' is not a request"),
        (HEADER + "0,1\n", "line 2: '0,1' is not a request"),
        (HEADER + "0,0,1\n", "line 2: a request has at least 1 token"),
        (HEADER + "nan,1,1\n", "line 2: .* is no time"),
        (HEADER + "yesterday,1,1\n", "line 2: .*yesterday"),
        (HEADER + "5,1,1\n4,1,1\n", "line 3: is earlier than the line before"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        read_trace(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.csv"):
        read_trace(tmp_path / "nowhere.csv")
