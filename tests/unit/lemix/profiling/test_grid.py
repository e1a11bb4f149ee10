"""What is measured covers what stages are asked for, and fits the model."""

import pytest

from lemix.profiling.grid import MAX_ROWS, decoding, grid_for, mixed, prefill


@pytest.mark.parametrize("is_quick", [True, False])
@pytest.mark.parametrize("context_length", [128, 1024, 4096])
def test_everything_fits_the_context_and_the_room_for_rows(context_length: int, is_quick: bool) -> None:
    grid = grid_for(context_length, is_quick=is_quick)
    for shape in grid.iterations:
        assert all(start + num_tokens <= context_length for start, num_tokens in shape.chunks)
        assert shape.num_tokens <= MAX_ROWS
    for lengths in grid.microbatches:
        assert max(lengths) <= context_length and sum(lengths) <= MAX_ROWS


@pytest.mark.parametrize("is_quick", [True, False])
def test_no_feature_of_a_fit_goes_without_measurements(is_quick: bool) -> None:
    """Tokens, sequences and context are varied each on its own."""
    shapes = grid_for(1024, is_quick=is_quick).iterations
    assert len({shape.num_tokens for shape in shapes if len(shape.chunks) == 1}) >= 3
    assert any(len(shape.chunks) > 1 for shape in shapes)
    assert any(shape.chunks[0][0] > 0 for shape in shapes if len(shape.chunks) == 1)


def test_every_sequence_has_blocks_of_its_own_in_the_room() -> None:
    grid = grid_for(1024, is_quick=False)
    for shape in grid.iterations:
        blocks = sum(-(-(start + num_tokens) // 16) for start, num_tokens in shape.chunks)
        assert blocks * 16 <= grid.kv_tokens


def test_shapes_are_what_their_names_say() -> None:
    assert prefill(5, 3).chunks == ((5, 3),)
    assert decoding(2, 7).chunks == ((7, 1), (7, 1))
    assert mixed(1, 7, 9, 4).chunks == ((7, 1), (9, 4))
    assert mixed(1, 7, 9, 4).num_tokens == 5
