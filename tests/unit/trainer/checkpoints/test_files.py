"""Checkpoints on the disk: whole or not at all."""

import errno
import hashlib
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.trainer.checkpoints.files import CheckpointFiles
from services.trainer.checkpoints.manifests import Verdict, ledger_of
from services.trainer.checkpoints.retention import Retention
from services.trainer.publication.losses import Losses
from shared import checkpoints, disk
from shared.bus.base import StreamState
from shared.checkpoints import Checkpoint
from shared.errors import ConfigurationError
from shared.messages.training import ShardSaved
from tests.unit.trainer.support import break_disk_at, manifest


def shards(folder: Path) -> list[ShardSaved]:
    """What two stages have written."""
    saved = []
    for stage in (1, 2):
        name = f"model-{stage:05}-of-00002.safetensors"
        (folder / name).write_text("weights")
        digest = hashlib.sha256(b"weights").hexdigest()
        saved.append(
            ShardSaved(
                version=1, sha256_by_file={name: digest}, file_by_tensor={f"t{stage}": name}, size_bytes=7
            )
        )
    return saved


@pytest.fixture
def files(tmp_path: Path) -> CheckpointFiles:
    return files_of(tmp_path)


def files_of(tmp_path: Path, *, merge: str = "none") -> CheckpointFiles:
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    (model / "tokenizer.json").write_text("{}")
    (model / "model.safetensors").write_text("the weights before training")
    return CheckpointFiles(tmp_path / "checkpoints", model_folder=model, keep=Retention(2), merge=merge)


def save(files: CheckpointFiles, version: int, node: int = 0, **fields: object) -> Path:
    folder = files.temporary(node, version, 1)
    files.begin(folder)
    return files.finish(folder, manifest(version, node=node, **fields), shards(folder)).folder


def test_a_checkpoint_is_one_model_with_its_tokenizer(files: CheckpointFiles, tmp_path: Path) -> None:
    folder = save(files, 16)

    assert folder == tmp_path / "checkpoints" / "node-0" / "step-00000016"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "lemix.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 14
    assert index["weight_map"]["t2"] == "model-00002-of-00002.safetensors"


def adapter_shards(folder: Path) -> list[ShardSaved]:
    """What two stages have written of an adapter, the first with its config."""
    saved = []
    for stage in (1, 2):
        name = f"adapter_model-{stage:05}-of-00002.safetensors"
        save_file({f"t{stage}": torch.full((2,), float(stage))}, folder / name)
        (folder / f"optimizer-{stage}").write_text("state")
        names = {name: "?", f"optimizer-{stage}": hashlib.sha256(b"state").hexdigest()}
        if stage == 1:
            (folder / "adapter_config.json").write_text("{}")
            names["adapter_config.json"] = hashlib.sha256(b"{}").hexdigest()
        saved.append(
            ShardSaved(
                version=1,
                sha256_by_file=names,
                file_by_tensor={f"t{stage}": name},
                size_bytes=8,
                adapter="lora",
            )
        )
    return saved


def test_an_adapters_checkpoint_is_one_file_beside_its_config(files: CheckpointFiles) -> None:
    folder = files.temporary(0, 1, 1)
    files.begin(folder)

    made = files.finish(folder, manifest(1), adapter_shards(folder))

    assert made.manifest.adapter == "lora"
    assert sorted(path.name for path in made.folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "lemix.json",
        "optimizer-1",
        "optimizer-2",
        "tokenizer.json",
    ]
    assert load(files)[0].manifest == made.manifest
    tensors = load_file(made.folder / "adapter_model.safetensors")
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"t1": [1.0, 1.0], "t2": [2.0, 2.0]}


def test_stages_that_train_different_kinds_of_weights_make_no_checkpoint(files: CheckpointFiles) -> None:
    folder = files.temporary(0, 1, 1)
    files.begin(folder)
    saved = [shards(folder)[0], adapter_shards(folder)[1]]

    with pytest.raises(ConfigurationError, match="different LEMIX_ADAPTER"):
        files.finish(folder, manifest(1), saved)


def load(files: CheckpointFiles) -> dict[int, Checkpoint]:
    return files.load(model="m", stream="s")


def test_the_newest_whole_checkpoint_of_each_node_is_found(files: CheckpointFiles, tmp_path: Path) -> None:
    save(files, 1)
    save(files, 2)
    other = save(files, 7, node=3)
    root = tmp_path / "checkpoints"
    (root / "node-0" / "step-00000009").mkdir()

    found = load(files)

    assert {node: checkpoint.manifest.version for node, checkpoint in found.items()} == {0: 2, 3: 7}
    assert found[3].folder == other
    assert checkpoints.latest(root, 1) is None
    assert checkpoints.latest(root / "nothing", 0) is None


def test_old_checkpoints_are_removed_and_so_is_what_dead_writers_left(files: CheckpointFiles) -> None:
    left_behind = files.temporary(0, 1, 1)
    files.begin(left_behind)
    for version in (1, 2, 3):
        newest = save(files, version)
    files.prune(0, now_wall_s=0.0)

    assert sorted(path.name for path in newest.parent.iterdir()) == ["step-00000002", "step-00000003"]


def test_what_is_left_of_one_that_was_being_removed_is_no_checkpoint(
    files: CheckpointFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in (1, 2, 3):
        save(files, version)

    def break_off(folder: Path) -> None:
        raise OSError(f"killed at {folder.name}")

    monkeypatch.setattr("services.trainer.checkpoints.files.shutil.rmtree", break_off)
    with pytest.raises(OSError, match="step-00000001"):
        files.prune(0, now_wall_s=0.0)
    withhold(files, 4, 5)
    for version in (2, 3):
        (checkpoints.node_folder(files.root, 0) / f"step-0000000{version}" / "lemix.json").unlink()

    assert checkpoints.newest_serving(files.root, [0], model="m") is None


def withhold(files: CheckpointFiles, *versions: int, node: int = 0) -> None:
    """Checkpoints that a guard has not let serve."""
    for version in versions:
        folder = files.temporary(node, version, 1)
        files.begin(folder)
        files.finish(folder, manifest(version, node=node, may_serve=False), shards(folder))


def test_what_serves_is_not_removed_however_many_newer_ones_are_withheld(files: CheckpointFiles) -> None:
    save(files, 1)
    save(files, 2)
    withhold(files, 3, 4, 5)
    files.prune(0, now_wall_s=0.0)

    versions = [each.manifest.version for each in checkpoints.checkpoints(files.root, 0)]
    assert versions == [5, 4, 2]
    assert load(files)[0].manifest.version == 5, "training goes on from the newest"


def test_a_version_that_was_let_serve_says_so_with_its_loss_wherever_its_checkpoint_is(
    files: CheckpointFiles, tmp_path: Path
) -> None:
    merged = files_of(tmp_path, merge="average")
    withhold(files, 1, 2, 3)
    withhold(files, 4, node=1)
    for verdict in (
        Verdict(2, Losses(held_out=0.5), True),
        Verdict(3, Losses(held_out=0.9), False),
        Verdict(4, Losses(held_out=0.4), True),
    ):
        merged.note_verdict(0, verdict)

    def of_each(node: int) -> list[tuple[int, float | None, bool]]:
        manifests = [each.manifest for each in checkpoints.checkpoints(files.root, node)]
        return [(each.version, each.held_out_loss, each.may_serve) for each in manifests]

    assert of_each(0) == [(3, 0.9, False), (2, 0.5, True), (1, None, False)]
    assert of_each(1) == [(4, 0.4, True)]
    of_0, of_both = files.serving(0), merged.serving(0)
    assert of_0 and of_both
    assert (of_0.manifest.version, of_both.manifest.version) == (2, 4)


def test_what_serves_first_is_the_newest_that_may_and_is_whole(files: CheckpointFiles) -> None:
    save(files, 1)
    good = save(files, 2)
    save(files, 3, node=1)
    withhold(files, 4)

    def newest(*nodes: int) -> Checkpoint | None:
        return checkpoints.newest_serving(files.root, nodes, model="m")

    def version_of(found: Checkpoint | None) -> int | None:
        return found.manifest.version if found else None

    assert (version_of(newest(0)), version_of(newest(0, 1)), newest(2)) == (2, 3, None)
    (good / "model-00002-of-00002.safetensors").write_text("weightx")
    with pytest.raises(ConfigurationError, match="step-00000002 is damaged"):
        newest(0)


def test_manifests_of_before_there_were_guards_may_serve(files: CheckpointFiles) -> None:
    folder = save(files, 1)
    older = json.loads((folder / "lemix.json").read_text())
    del older["may_serve"]
    (folder / "lemix.json").write_text(json.dumps(older))

    serving = files.serving(0)
    assert serving and serving.folder == folder


def test_a_reported_file_that_is_not_there_makes_no_checkpoint(files: CheckpointFiles) -> None:
    folder = files.temporary(0, 1, 1)
    files.begin(folder)
    written = shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()

    with pytest.raises(FileNotFoundError, match="model-00002"):
        files.finish(folder, manifest(1), written)

    assert load(files) == {}


def test_a_broken_folder_of_the_same_version_is_replaced(files: CheckpointFiles) -> None:
    folder = save(files, 1)
    (folder / "lemix.json").unlink()

    assert save(files, 1) == folder
    assert load(files)[0].manifest.version == 1


def test_a_whole_checkpoint_of_the_same_version_stays(files: CheckpointFiles) -> None:
    folder = save(files, 1)
    weights = (folder / "model-00001-of-00002.safetensors").stat().st_ino

    with pytest.raises(OSError, match="another trainer"):
        save(files, 1)

    assert (folder / "model-00001-of-00002.safetensors").stat().st_ino == weights


def test_a_checkpoint_of_another_model_is_refused(files: CheckpointFiles) -> None:
    save(files, 1)

    with pytest.raises(ConfigurationError, match="model 'm', not of 'other': choose another --name"):
        files.load(model="other", stream="s")


def test_a_model_folder_may_be_named_in_two_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints.check_model(Checkpoint(manifest(1, model="./models/m"), tmp_path), str(tmp_path / "models/m"))


def test_a_checkpoint_of_another_stream_is_refused(files: CheckpointFiles) -> None:
    folder = files.temporary(0, 1, 1)
    files.begin(folder)
    files.finish(folder, manifest(1, stream="s"), shards(folder))

    assert load(files)[0].manifest.version == 1
    with pytest.raises(ConfigurationError, match="another training stream"):
        files.load(model="m", stream="of another server")


@pytest.mark.parametrize(
    "content", ['{"node": 0', manifest(8, sha256_by_file={"gone.safetensors": "1"}).model_dump_json()]
)
def test_a_newest_checkpoint_that_is_no_longer_whole_is_named(files: CheckpointFiles, content: str) -> None:
    folder = save(files, 1).with_name("step-00000008")
    folder.mkdir()
    (folder / "lemix.json").write_text(content)

    with pytest.raises(ConfigurationError, match="step-00000008 is damaged"):
        load(files)


def damage(file: Path) -> None:
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])


@pytest.mark.parametrize(
    "name",
    ["config.json", "model-00002-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"],
)
def test_a_damaged_checkpoint_is_named(files: CheckpointFiles, name: str) -> None:
    save(files, 1)
    folder = save(files, 2)
    damage(folder / name)

    with pytest.raises(ConfigurationError, match=f"step-00000002 is damaged: {name} is not what its manif"):
        load(files)


def test_every_file_of_a_checkpoint_is_in_its_manifest(files: CheckpointFiles) -> None:
    folder = save(files, 1)
    names = {path.name for path in folder.iterdir()} - {"lemix.json"}
    assert load(files)[0].manifest.sha256_by_file.keys() == names


def test_manifests_that_name_only_what_stages_have_written_still_load(files: CheckpointFiles) -> None:
    folder = save(files, 1)
    older = json.loads((folder / "lemix.json").read_text())
    for name in ("config.json", "model.safetensors.index.json", "tokenizer.json"):
        del older["sha256_by_file"][name]
    (folder / "lemix.json").write_text(json.dumps(older))
    damage(folder / "config.json")

    assert load(files)[0].manifest.version == 1


def test_the_stream_is_needed_from_the_oldest_checkpoint_on(files: CheckpointFiles) -> None:
    assert files.oldest_watermark() == 0
    for node, version, watermark in ((0, 1, 3), (0, 2, 8), (0, 3, 9), (1, 1, 10)):
        folder = files.temporary(node, version, 1)
        files.begin(folder)
        files.finish(folder, manifest(version, node=node, watermark=watermark), shards(folder))
    files.prune(0, now_wall_s=0.0)

    assert files.oldest_watermark() == 8


def at(first: int, last: int, *, of: str = "s") -> StreamState:
    return StreamState(of, first_sequence=first, last_sequence=last)


def test_a_run_begins_once_wherever_the_stream_has_got_to_since(files: CheckpointFiles) -> None:
    assert files.begun_after(at(4, 9), "first", has_checkpoints=False) == 3
    assert files.begun_after(at(7, 12), "first", has_checkpoints=False) == 3
    assert files.begun_after(at(7, 12), "first", has_checkpoints=True) == 3
    assert files.begun_after(at(7, 12), "next", has_checkpoints=True) == 3, "it has begun"


def test_a_run_without_checkpoints_that_is_to_begin_elsewhere_does(files: CheckpointFiles) -> None:
    assert files.begun_after(at(1, 9), "first", has_checkpoints=False) == 0
    assert files.begun_after(at(1, 9), "next", has_checkpoints=False) == 9
    assert files.begun_after(at(1, 12), "next", has_checkpoints=False) == 9
    assert files.begun_after(at(1, 2, of="another"), "next", has_checkpoints=False) == 2


def test_where_older_runs_began_is_known_of_those_that_began_with_the_next_batch(
    files: CheckpointFiles,
) -> None:
    assert files.begun_after(at(5, 9), "first", has_checkpoints=True) == 0
    files.root.mkdir()
    (files.root / "start.json").write_text('{"stream": "s", "after_sequence": 6}')
    assert files.begun_after(at(5, 9), "next", has_checkpoints=False) == 6
    assert files.begun_after(at(5, 9), "next", has_checkpoints=True) == 6


def test_the_ledger_is_what_all_manifests_say_together(files: CheckpointFiles, tmp_path: Path) -> None:
    for node, content in enumerate(
        [
            {"watermark": 3, "sequences": (5, 8), "recent_batch_ids": ("a", "b")},
            {"watermark": 4, "sequences": (7,), "rejected": (2, 6), "recent_batch_ids": ("c",)},
        ]
    ):
        folder = files.temporary(node, 9, 1)
        files.begin(folder)
        files.finish(folder, manifest(9, node=node, **content), shards(folder))

    ledger = ledger_of(load(files).values())

    assert ledger.watermark == 8
    assert ledger.lineage(1).version == 9
    assert all(ledger.knows(batch_id) for batch_id in "abc")


def test_a_disk_that_fills_at_any_place_leaves_the_old_checkpoint_and_the_next_one_succeeds(
    files: CheckpointFiles,
) -> None:
    save(files, 1)
    with pytest.MonkeyPatch.context() as patch:
        calls = break_disk_at(patch, 0, OSError())
        save(files, 2)
    assert {"mkdir", "write_text", "fsync", "copyfile", "replace", "rename"} <= set(calls)
    full = OSError(errno.ENOSPC, "No space left on device")

    for nth in range(1, len(calls) + 1):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space left"):
            break_disk_at(patch, nth, full)
            save(files, 3)
        whole = [each.manifest.version for each in checkpoints.checkpoints(files.root, 0)]
        is_renamed = nth == len(calls)  # only the sync of the folder's name comes after that
        assert whole == ([3, 2, 1] if is_renamed else [2, 1])
        assert load(files)[0].manifest.version == whole[0]

    assert save(files, 4).name == "step-00000004"


def test_a_new_folders_name_is_on_the_disk_before_anything_in_it(files: CheckpointFiles) -> None:
    synced: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "sync", synced.append)
        files.begin(files.temporary(0, 1, 1))

    node = files.root / "node-0"
    assert synced == [node, files.root, files.root.parent]


def test_going_on_with_other_settings_is_said(
    files: CheckpointFiles, caplog: pytest.LogCaptureFixture
) -> None:
    trained = manifest(1, settings={"schedule": "1f1b", "learning_rate": "0.1", "dtype": "float32"})
    checkpoint = Checkpoint(trained, files.root)
    caplog.set_level(logging.WARNING)

    checkpoints.warn_of_other_settings(checkpoint, {"schedule": "1f1b", "learning_rate": "0.1", "new": "1"})
    assert caplog.text == ""
    checkpoints.warn_of_other_settings(checkpoint, {"schedule": "async", "learning_rate": "0.2"})

    assert "other settings: schedule=async (was 1f1b), learning_rate=0.2 (was 0.1)" in caplog.text
