"""`lemix weights`, without a cluster: what a run's folder says, and a version as a model of its own."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from lemix.weights_command import age_of, list_folder, run_export, versions_table
from services.trainer.checkpoints.files import CheckpointFiles
from services.trainer.checkpoints.retention import Retention
from shared.errors import ConfigurationError
from shared.messages.training import ShardSaved
from shared.messages.weights import DurableVersion
from tests.support.models import save_tiny_model
from tests.unit.trainer.support import manifest

TOKENS = torch.tensor([[3, 14, 15, 92, 65, 35]])


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def save(runs_dir: Path, model: Path, version: int, node: int = 0) -> Path:
    """A checkpoint of one stage, with the model's own weights."""
    root = runs_dir / "default" / "checkpoints"
    files = CheckpointFiles(root, model_folder=model, keep=Retention(9), merge="none")
    folder = files.temporary(node, version, 1)
    files.begin(folder)
    name, optimizer = "model-00001-of-00001.safetensors", "optimizer-00001-of-00001.safetensors"
    (folder / name).write_bytes((model / "model.safetensors").read_bytes())
    (folder / optimizer).write_bytes(b"moments")
    with safe_open(folder / name, framework="pt") as file:
        tensors = dict.fromkeys(file.keys(), name)
    shard = ShardSaved(version=version, sha256_by_file={}, file_by_tensor=tensors, size_bytes=1)
    return files.finish(
        folder, manifest(version, node=node, recent_batch_ids=(f"b{version}",)), [shard]
    ).folder


def test_a_runs_folder_is_listed_when_nothing_runs(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "model")
    for node, version in ((0, 4), (0, 8), (1, 6)):
        save(tmp_path, tmp_path / "model", version, node)

    shown = console()
    list_folder(tmp_path / "default" / "checkpoints", shown, 0.0)

    rows = [line.split() for line in printed(shown).splitlines() if line.strip()[:1].isdigit()]
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("0", "8", "b8"),
        ("0", "4", "b4"),
        ("0", "0", "given"),
        ("1", "6", "b6"),
        ("1", "0", "given"),
    ]


def test_what_is_served_and_lost_is_shown() -> None:
    common = {"node": 0, "created_wall_s": 0.0, "newest_batch_id": "b"}
    rows = (
        DurableVersion(**common, version=9, held_out_loss=0.25, may_serve=True, num_ahead=2),
        DurableVersion(**common, version=8, held_out_loss=None, may_serve=True, num_ahead=0),
        DurableVersion(**common, version=7, held_out_loss=None, may_serve=True, num_ahead=None),
        DurableVersion(**common, version=6, held_out_loss=0.5, may_serve=False, num_ahead=None),
    )
    shown = console()
    shown.print(versions_table(rows, "run demo", 0.0))

    ends = [line.split(" b ")[1].split() for line in printed(shown).splitlines() if " b " in line]
    assert ends == [["0.2500", "yes,", "and", "2", "batches", "more"], ["yes"], [], ["0.5000", "may", "not"]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_exported_version_has_the_same_logprobs_and_nothing_of_training(
    family: str, tmp_path: Path
) -> None:
    model = save_tiny_model(family, tmp_path / "model")
    save(tmp_path, tmp_path / "model", 4)

    run_export(4, tmp_path / "out", None, tmp_path / "default" / "checkpoints", console())

    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model-00001-of-00001.safetensors"} | {
        "model.safetensors.index.json"
    }
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(exported(TOKENS).logits, model(TOKENS).logits)


def test_version_0_is_not_exported() -> None:
    with pytest.raises(ConfigurationError, match="version 0 is the model as it was given"):
        run_export(0, Path("out"), None, Path("nowhere"), console())


@pytest.mark.parametrize(
    ("seconds", "age"),
    [
        (-1, "0 s"),
        (0.9, "0 s"),
        (119, "119 s"),
        (120, "2 min"),
        (7199, "119 min"),
        (7200, "2 h"),
        (3 * 86400, "3 d"),
    ],
)
def test_an_age_is_told_in_its_largest_unit(seconds: float, age: str) -> None:
    assert age_of(seconds) == age


def test_an_export_overwrites_nothing(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "model")
    save(tmp_path, tmp_path / "model", 4)
    mine = tmp_path / "out" / "mine"
    mine.parent.mkdir()
    mine.write_text("mine")

    with pytest.raises(ConfigurationError, match="out is there already, and not an empty folder"):
        run_export(4, tmp_path / "out", None, tmp_path / "default" / "checkpoints", console())
    mine.unlink()
    run_export(4, tmp_path / "out", None, tmp_path / "default" / "checkpoints", console())

    assert (tmp_path / "out" / "config.json").exists()


def test_a_version_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "model")
    for node, version in ((0, 4), (0, 8), (1, 8)):
        save(tmp_path, tmp_path / "model", version, node)

    with pytest.raises(
        ConfigurationError, match=r"no durable version 5 in .*: 8 \(node 0\), 4 \(node 0\), 8"
    ):
        run_export(5, tmp_path / "out", None, tmp_path / "default" / "checkpoints", console())
    with pytest.raises(ConfigurationError, match="nodes 0, 1 each have a version 8: choose one with --node"):
        run_export(8, tmp_path / "out", None, tmp_path / "default" / "checkpoints", console())
    run_export(8, tmp_path / "out", 1, tmp_path / "default" / "checkpoints", console())


def test_a_damaged_version_is_not_exported(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "model")
    folder = save(tmp_path, tmp_path / "model", 4)
    (folder / "model.safetensors.index.json").write_text("{}")

    with pytest.raises(ConfigurationError, match=r"is damaged: model\.safetensors\.index\.json is not what"):
        run_export(4, tmp_path / "out", None, tmp_path / "default" / "checkpoints", console())
    assert not (tmp_path / "out").exists()
