"""The lineage file: what is told of a version follows from its manifest, whatever else was appended."""

from pathlib import Path

import pytest

from shared import lineage
from shared.errors import ConfigurationError
from shared.messages.lineage import MAX_NAME_CHARACTERS, MAX_SOURCES, ExampleSource, LearntBatch, LineageEntry
from tests.unit.trainer.support import manifest

MAX_MESSAGE_BYTES = 1 << 20
"""That NATS carries unless it is told otherwise."""


def batches(*ids: str, sources: tuple[ExampleSource, ...] = ()) -> list[LearntBatch]:
    return [LearntBatch(id=each, sequence=1, producer="p", sha256="0" * 64, sources=sources) for each in ids]


def told(root: Path, version: int, place: int | None) -> tuple[list[str], int]:
    """The ids of all batches of a version, and how many more are not known."""
    entries = [lineage.newest_entry(root, manifest(version, lineage_entry=place))]
    while (older := entries[-1].older) is not None:
        entries.append(lineage.read_entry(root, older))
    return [each.id for entry in reversed(entries) for each in entry.batches], entries[-1].num_before


def test_each_version_has_the_batches_of_those_that_it_descends_from(tmp_path: Path) -> None:
    first = lineage.append(tmp_path, batches("a", "b"), num_before=0, older=None)
    lost = lineage.append(tmp_path, batches("c", "d"), num_before=2, older=first)
    other = lineage.append(tmp_path, batches("d"), num_before=2, older=first)
    newest = lineage.append(tmp_path, batches("c"), num_before=3, older=other)
    assert told(tmp_path, 2, first) == (["a", "b"], 0)
    assert told(tmp_path, 4, lost) == (["a", "b", "c", "d"], 0)
    assert told(tmp_path, 3, other) == (["a", "b", "d"], 0)
    assert told(tmp_path, 4, newest) == (["a", "b", "d", "c"], 0)


def test_nothing_is_told_of_what_was_learnt_before_lineages_were_kept(tmp_path: Path) -> None:
    assert told(tmp_path, 5, None) == ([], 5)
    place = lineage.append(tmp_path, batches("f"), num_before=5, older=None)
    assert told(tmp_path, 6, place) == (["f"], 5)


def test_the_model_as_it_was_given_has_learnt_nothing(tmp_path: Path) -> None:
    assert told(tmp_path, 0, None) == ([], 0)


def test_a_line_that_its_trainer_died_in_is_passed_over(tmp_path: Path) -> None:
    first = lineage.append(tmp_path, batches("a"), num_before=0, older=None)
    path = tmp_path / lineage.FILE_NAME
    path.write_bytes(path.read_bytes() + path.read_bytes()[:20])
    second = lineage.append(tmp_path, batches("b"), num_before=1, older=first)
    assert told(tmp_path, 2, second) == (["a", "b"], 0)


def test_a_long_save_is_cut_into_entries_that_fit_into_a_message(tmp_path: Path) -> None:
    ids = [f"b{number:03}" for number in range(150)]
    assert told(tmp_path, 150, lineage.append(tmp_path, batches(*ids), num_before=0, older=None)) == (ids, 0)

    name = "\N{GRINNING FACE}" * MAX_NAME_CHARACTERS
    source = ExampleSource(id=name, producer=name, sha256="0" * 64)
    large = batches(*ids, sources=(source,) * (MAX_SOURCES - 1))
    place = lineage.append(tmp_path, large, num_before=0, older=None)
    assert told(tmp_path, 150, place) == (ids, 0)
    lines = (tmp_path / lineage.FILE_NAME).read_bytes().splitlines()
    assert max(map(len, lines)) < MAX_MESSAGE_BYTES


@pytest.mark.parametrize("place", [1, 10_000])
def test_a_place_without_an_entry_is_told(place: int, tmp_path: Path) -> None:
    lineage.append(tmp_path, batches("a"), num_before=0, older=None)
    with pytest.raises(ConfigurationError, match=f"lineage.jsonl is damaged: there is no entry at {place}"):
        lineage.read_entry(tmp_path, place)


def test_an_entry_of_another_version_is_damage(tmp_path: Path) -> None:
    place = lineage.append(tmp_path, batches("a"), num_before=0, older=None)
    with pytest.raises(ConfigurationError, match="is not that of version 7"):
        lineage.newest_entry(tmp_path, manifest(7, lineage_entry=place))


def test_an_entry_that_leads_back_to_itself_is_damage(tmp_path: Path) -> None:
    place = lineage.append(tmp_path, batches("a"), num_before=1, older=0)
    assert place == 0
    with pytest.raises(ConfigurationError, match="the entry at 0 says that an older one is at 0"):
        lineage.read_entry(tmp_path, place)


def test_an_entry_is_a_line_of_json_that_anyone_reads(tmp_path: Path) -> None:
    lineage.append(tmp_path, batches("a"), num_before=0, older=None)
    assert (tmp_path / lineage.FILE_NAME).read_text() == (
        '{"version":1,"num_before":0,"older":null,"batches":[{"id":"a","sequence":1,"producer":"p",'
        f'"sha256":"{"0" * 64}","sources":[]}}]}}\n'
    )
    assert lineage.read_entry(tmp_path, 0) == LineageEntry(
        version=1, num_before=0, older=None, batches=tuple(batches("a"))
    )
