"""Batches cut into microbatches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.intake.microbatches import TrainingBatch, cut, join, split
from shared.encoding import LabelledTokens


@pytest.mark.parametrize(
    ("lengths", "num_groups", "max_tokens", "sizes"),
    [
        ([5, 5, 5, 5], 4, 100, [1, 1, 1, 1]),
        ([5, 5, 5, 5], 2, 100, [2, 2]),
        ([5], 4, 100, [1]),
        ([1, 1, 1, 9], 2, 100, [3, 1]),
        ([9, 1, 1, 1], 2, 100, [1, 3]),
        ([4, 4, 4, 4], 2, 4, [1, 1, 1, 1]),
        ([3, 3, 3, 3, 3], 1, 6, [2, 2, 1]),
        ([1, 1, 1, 100], 4, 100, [1, 1, 1, 1]),
    ],
)
def test_groups_are_balanced(lengths: list[int], num_groups: int, max_tokens: int, sizes: list[int]) -> None:
    assert [len(group) for group in split(lengths, num_groups, max_tokens)] == sizes


@given(st.lists(st.integers(2, 50), min_size=1, max_size=40), st.integers(1, 8), st.integers(50, 200))
def test_every_example_is_in_one_group_in_order(lengths: list[int], num_groups: int, max_tokens: int) -> None:
    groups = split(lengths, num_groups, max_tokens)

    assert [position for group in groups for position in group] == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in group) <= max_tokens for group in groups)
    assert len(groups) >= min(num_groups, len(lengths))


def test_rows_and_labels_follow_their_examples() -> None:
    rows = join([LabelledTokens((7, 8, 9), (0, 1)), LabelledTokens((4, 5, 6), (1,))])

    assert rows.lengths == (3, 3)
    assert rows.tokens == (7, 8, 9, 4, 5, 6)
    assert rows.label_rows == (0, 1, 4)
    assert rows.labels == (8, 9, 6)


def test_the_two_answers_of_a_preference_stay_together() -> None:
    preferences = [(labelled(3), labelled(5)), (labelled(2), labelled(2)), (labelled(9), labelled(1))]

    assert [rows.lengths for rows in cut(preferences, 2, 10)] == [(3, 5), (2, 2), (9, 1)]
    assert [rows.lengths for rows in cut(preferences, 2, 12)] == [(3, 5, 2, 2), (9, 1)]


def labelled(num_tokens: int) -> LabelledTokens:
    return LabelledTokens(tuple(range(num_tokens)), (0,) if num_tokens > 1 else ())


def test_the_loss_of_preferences_is_the_mean_over_the_pairs_of_the_whole_batch() -> None:
    microbatches = cut([(labelled(3), labelled(2))] * 3, 2, 10)

    assert len(microbatches) == 2
    assert TrainingBatch("b", 1, microbatches, b"{}", "", beta=0.1).loss_weight == 1 / 3


def test_the_loss_is_the_mean_over_the_labels_of_the_whole_batch() -> None:
    one, two = join([LabelledTokens((1, 2, 3), (0, 1))]), join([LabelledTokens((1, 2), (0,))] * 2)

    batch = TrainingBatch("b", 1, (one, two), b"{}", "")

    assert batch.loss_weight == 1 / 4
    assert batch.num_tokens == 7
