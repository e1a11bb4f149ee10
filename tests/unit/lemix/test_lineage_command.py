"""`lemix lineage`: what is shown of a version's batches, from a run's files."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from lemix.lineage_command import GIVEN, json_of, read_lineage, show_lineage
from shared.errors import ConfigurationError
from shared.messages.lineage import ExampleSource, LearntBatch
from tests.unit.trainer.checkpoints.test_files import files_of, shards
from tests.unit.trainer.support import manifest

SOURCES = (
    ExampleSource(id="feedback-1", producer="ann (k1)", sha256="1" * 64),
    ExampleSource(id="feedback-2", producer="", sha256="2" * 64),
)


def batch(number: int, producer: str = "bob@host", sources: tuple[ExampleSource, ...] = ()) -> LearntBatch:
    sha256 = f"{number:064}"
    return LearntBatch(id=f"b{number}", sequence=number, producer=producer, sha256=sha256, sources=sources)


def run_with(tmp_path: Path, *saves: list[LearntBatch], node: int = 0, begun_at: int = 0) -> Path:
    """The checkpoints of a run that has saved so often, each time these batches."""
    files, version, entry = files_of(tmp_path), begun_at, None
    for learnt in saves:
        version += len(learnt)
        folder = files.temporary(node, version, 1)
        files.begin(folder)
        before = manifest(version, node=node, lineage_entry=entry)
        entry = files.finish(folder, before, shards(folder), learnt).manifest.lineage_entry
    return files.root


def shown(root: Path, version: int, node: int | None = None) -> list[str]:
    console = Console(file=io.StringIO(), width=40)
    show_lineage(read_lineage(root, version, node), "run one", console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_each_batch_is_one_line_and_the_newest_the_last(tmp_path: Path) -> None:
    root = run_with(tmp_path, [batch(1), batch(2, "")], [batch(4, "ann (k1)", SOURCES)])
    first_two = [
        "1: b1, message 1, from bob@host, sha256 000000000000",
        "2: b2, message 2, from not told, sha256 000000000000",
    ]
    assert shown(root, 2) == ["run one, node 0: version 2 has learnt 2 batches", *first_two]
    assert shown(root, 3) == [
        "run one, node 0: version 3 has learnt 3 batches",
        *first_two,
        "3: b4, message 4, from ann (k1), sha256 000000000000: "
        "feedback-1 from ann (k1), sha256 111111111111; feedback-2 from not told, sha256 222222222222",
    ]


def test_a_single_batch_is_named_as_one(tmp_path: Path) -> None:
    root = run_with(tmp_path, [batch(1)])
    assert shown(root, 1)[0] == "run one, node 0: version 1 has learnt 1 batch"


def test_batches_from_before_lineages_were_kept_are_unknown(tmp_path: Path) -> None:
    root = run_with(tmp_path, [batch(9)], begun_at=8)
    assert shown(root, 9) == [
        "run one, node 0: version 9 has learnt 9 batches",
        "1 to 8: unknown, learnt before lineages were kept",
        "9: b9, message 9, from bob@host, sha256 000000000000",
    ]


def test_the_model_as_it_was_given_has_learnt_nothing(tmp_path: Path) -> None:
    assert shown(tmp_path, 0) == ["run one: version 0 is the model as it was given, and has learnt nothing"]
    assert json.loads(json_of(GIVEN)) == {"node": None, "version": 0, "num_unknown": 0, "batches": []}


def test_json_has_everything(tmp_path: Path) -> None:
    root = run_with(tmp_path, [batch(1, sources=SOURCES)])
    assert json.loads(json_of(read_lineage(root, 1, None))) == {
        "node": 0,
        "version": 1,
        "num_unknown": 0,
        "batches": [
            {
                "id": "b1",
                "sequence": 1,
                "producer": "bob@host",
                "sha256": f"{1:064}",
                "sources": [
                    {"id": "feedback-1", "producer": "ann (k1)", "sha256": "1" * 64},
                    {"id": "feedback-2", "producer": "", "sha256": "2" * 64},
                ],
            }
        ],
    }


def test_a_version_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    root = run_with(tmp_path, [batch(1)], [batch(2)])
    with pytest.raises(ConfigurationError, match=r"no durable version 7 .* there are: 2 \(node 0\), 1"):
        read_lineage(root, 7, None)


def test_of_nodes_that_train_apart_one_must_be_chosen(tmp_path: Path) -> None:
    root = run_with(tmp_path, [batch(1)])
    run_with(tmp_path, [batch(2)], node=1)
    with pytest.raises(ConfigurationError, match="nodes 0, 1 each have a version 1: choose one with --node"):
        read_lineage(root, 1, None)
    assert shown(root, 1, node=1)[1:] == ["1: b2, message 2, from bob@host, sha256 000000000000"]
