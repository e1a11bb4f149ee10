"""The arena of slots in shared memory, with producer and consumer in one process."""

import gc
from pathlib import Path

import pytest
import torch
from msgspec import structs
from torch import Tensor

from shared.errors import CarrierError, StaleTensorError
from shared.tensors.shm import ArenaReader, ArenaWriter

CPU = torch.device("cpu")
NO_WAIT_S = 0.0


def connected(folder: Path, *, slot_bytes: int = 256, num_slots: int = 2) -> tuple[ArenaWriter, ArenaReader]:
    writer = ArenaWriter(folder / "arena", slot_bytes=slot_bytes, num_slots=num_slots)
    return writer, ArenaReader(writer.path, slot_bytes=writer.slot_bytes, num_slots=num_slots)


def tensor_of(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int64", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 4), (2, 3, 4), (0, 4)])
def test_a_tensor_comes_out_as_it_went_in(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    writer, reader = connected(tmp_path)
    sent = (tensor_of(*shape) * 10).abs().to(getattr(torch, dtype))
    ref = writer.put(sent)
    assert (ref.shape, ref.dtype) == (shape, dtype)
    taken = reader.take(ref, CPU)
    assert taken.dtype == sent.dtype
    assert torch.equal(taken, sent)


@pytest.mark.parametrize("slot_bytes", [1, 57, 100])
def test_slots_of_any_size_hold_every_dtype(slot_bytes: int, tmp_path: Path) -> None:
    writer, reader = connected(tmp_path, slot_bytes=slot_bytes)
    refs = [writer.put(torch.tensor([value])) for value in (3, 4)]
    assert [reader.take(ref, CPU).item() for ref in refs] == [3, 4]


def test_a_tensor_need_not_be_contiguous(tmp_path: Path) -> None:
    writer, reader = connected(tmp_path)
    for sent in (tensor_of(4, 6).t(), tensor_of(4, 6)[:, ::2], tensor_of(1, 3).expand(4, 3)):
        assert torch.equal(reader.take(writer.put(sent), CPU), sent)


def test_a_tensor_with_a_graph_goes_without_it(tmp_path: Path) -> None:
    writer, reader = connected(tmp_path)
    sent = tensor_of(3).requires_grad_() * 2
    taken = reader.take(writer.put(sent), CPU)
    assert not taken.requires_grad
    assert torch.equal(taken, sent.detach())


def test_what_was_taken_is_private(tmp_path: Path) -> None:
    writer, reader = connected(tmp_path, num_slots=1)
    taken = reader.take(writer.put(torch.ones(3)), CPU)
    writer.put(torch.zeros(3))
    assert torch.equal(taken, torch.ones(3))


def test_slots_are_used_again_and_again(tmp_path: Path) -> None:
    writer, reader = connected(tmp_path, num_slots=2)
    for value in range(10):
        first, second = writer.put(torch.tensor([value])), writer.put(torch.tensor([-value]))
        assert first.slot != second.slot
        assert reader.take(second, CPU).item() == -value
        assert reader.take(first, CPU).item() == value
        assert first.generation == second.generation == value + 1


def test_a_full_arena_says_so_and_keeps_what_it_holds(tmp_path: Path) -> None:
    writer, reader = connected(tmp_path, num_slots=2)
    held = [writer.put(torch.tensor([value])) for value in (1, 2)]
    with pytest.raises(CarrierError, match="all 2 slots"):
        writer.put(torch.tensor([3]), timeout_s=NO_WAIT_S)
    assert [reader.take(ref, CPU).item() for ref in held] == [1, 2]
    assert reader.take(writer.put(torch.tensor([3]), timeout_s=NO_WAIT_S), CPU).item() == 3


def test_a_discarded_tensor_leaves_a_free_slot(tmp_path: Path) -> None:
    writer, reader = connected(tmp_path, num_slots=1)
    reader.discard(writer.put(torch.tensor([1])))
    ref = writer.put(torch.tensor([2]), timeout_s=NO_WAIT_S)
    assert reader.take(ref, CPU).item() == 2


def test_a_tensor_larger_than_a_slot_is_refused(tmp_path: Path) -> None:
    writer, _ = connected(tmp_path, slot_bytes=64)
    with pytest.raises(CarrierError, match="68 bytes for slots of 64 bytes"):
        writer.put(torch.zeros(17))
    writer.put(torch.zeros(16))


def test_a_handle_that_outlived_its_tensor_is_stale(tmp_path: Path) -> None:
    writer, reader = connected(tmp_path, num_slots=1)
    old = writer.put(torch.tensor([1]))
    reader.take(old, CPU)
    new = writer.put(torch.tensor([2]))
    for use in (lambda: reader.take(old, CPU), lambda: reader.discard(old)):
        with pytest.raises(StaleTensorError, match="asked for 1, there is 2"):
            use()
    assert reader.take(new, CPU).item() == 2


def test_a_handle_from_the_future_is_stale(tmp_path: Path) -> None:
    writer, reader = connected(tmp_path)
    ref = writer.put(torch.tensor([1]))
    with pytest.raises(StaleTensorError):
        reader.take(structs.replace(ref, generation=5), CPU)


def test_a_tensor_is_taken_once(tmp_path: Path) -> None:
    writer, reader = connected(tmp_path)
    ref = writer.put(torch.tensor([1]))
    reader.take(ref, CPU)
    with pytest.raises(StaleTensorError, match="taken before"):
        reader.take(ref, CPU)


def test_no_file_is_left_once_both_sides_have_it(tmp_path: Path) -> None:
    writer, reader = connected(tmp_path)
    before = writer.put(torch.tensor([1]))
    writer.unlink()
    assert list(tmp_path.iterdir()) == []
    after = writer.put(torch.tensor([2]))
    assert [reader.take(ref, CPU).item() for ref in (before, after)] == [1, 2]
    writer.unlink()


def test_the_reader_outlives_the_writer(tmp_path: Path) -> None:
    writer, reader = connected(tmp_path)
    ref = writer.put(torch.tensor([1]))
    writer.unlink()
    del writer
    gc.collect()
    assert reader.take(ref, CPU).item() == 1


def test_an_arena_is_made_once(tmp_path: Path) -> None:
    writer, reader = connected(tmp_path)
    with pytest.raises(CarrierError):
        ArenaWriter(writer.path, slot_bytes=64, num_slots=2)
    assert reader.take(writer.put(torch.tensor([1])), CPU).item() == 1


def test_no_folder_and_no_memory_are_told(tmp_path: Path) -> None:
    with pytest.raises(CarrierError, match="no 128 bytes"):
        ArenaWriter(tmp_path / "missing" / "arena", slot_bytes=64, num_slots=2)
    with pytest.raises(CarrierError, match="shared memory"):
        ArenaWriter(tmp_path / "arena", slot_bytes=1 << 60, num_slots=2)
    assert list(tmp_path.iterdir()) == []


def test_an_arena_out_of_reach_is_told(tmp_path: Path) -> None:
    with pytest.raises(CarrierError, match="cannot open"):
        ArenaReader(tmp_path / "missing", slot_bytes=64, num_slots=2)
    writer, _ = connected(tmp_path)
    with pytest.raises(CarrierError, match="cannot map"):
        ArenaReader(writer.path, slot_bytes=1 << 20, num_slots=2)
