"""Examples that a run holds out by itself: which ones, how many, and for how long."""

import stat
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.publication import hold_out
from services.trainer.publication.hold_out import (
    HOLD_OUT_FILE,
    MAX_EXAMPLES,
    MIN_EXAMPLES,
    HoldOut,
    is_chosen,
)
from shared.encoding import LabelledTokens
from shared.errors import ConfigurationError


def examples(count: int, first: int = 0) -> list[LabelledTokens]:
    """Each is another one."""
    return [LabelledTokens((number, 1, 2), (0, 1)) for number in range(first, first + count)]


def held_by(run: HoldOut, published: list[LabelledTokens]) -> list[LabelledTokens]:
    return [each for each, is_held_out in zip(published, run.select(published), strict=True) if is_held_out]


def again(folder: Path, share: float, model: str = "m") -> HoldOut:
    """The set in the next life of the trainer."""
    run = HoldOut(folder, model=model, share=share)
    run.load()
    return run


def test_about_the_share_is_chosen_and_always_the_same() -> None:
    published = examples(4000)
    chosen = [is_chosen(each, 0.1) for each in published]
    assert 320 < sum(chosen) < 480
    assert chosen == [is_chosen(each, 0.1) for each in published]
    assert all(is_chosen(each, 0.2) for each, is_in in zip(published, chosen, strict=True) if is_in)


def test_no_more_are_held_out_than_may_be(tmp_path: Path) -> None:
    run = HoldOut(tmp_path, model="m", share=0.5)
    published = examples(4 * MAX_EXAMPLES)
    held = held_by(run, published[: MAX_EXAMPLES // 4]) + held_by(run, published[MAX_EXAMPLES // 4 :])
    assert held == [each for each in published if is_chosen(each, 0.5)][:MAX_EXAMPLES]
    assert run.freeze() == tuple(held)


def test_what_was_held_out_stays_so_in_every_epoch_and_life_of_the_trainer(tmp_path: Path) -> None:
    published = examples(400)
    run = HoldOut(tmp_path, model="m", share=0.1)
    held = held_by(run, published)
    assert held_by(run, published[::-1]) == held[::-1]
    for share in (0.1, 0.0):
        assert held_by(again(tmp_path, share), published) == held
    assert held_by(again(tmp_path, 0.0), examples(400, first=400)) == []
    assert held_by(again(tmp_path, 0.0, model="other"), published) == []


def test_a_set_that_versions_are_compared_on_does_not_grow(tmp_path: Path) -> None:
    run = HoldOut(tmp_path, model="m", share=0.1)
    held = held_by(run, examples(400))
    assert len(held) >= MIN_EXAMPLES and run.freeze() == tuple(held)
    run.save()
    for life in (run, again(tmp_path, 0.1)):
        assert held_by(life, examples(400, first=400)) == []
        assert life.freeze() == tuple(held)


def test_too_few_examples_are_no_set_to_compare_on(tmp_path: Path) -> None:
    run = HoldOut(tmp_path, model="m", share=0.999)
    assert len(held_by(run, examples(MIN_EXAMPLES - 1))) == MIN_EXAMPLES - 1
    assert run.freeze() == () and not run.is_frozen
    held_by(run, examples(8, first=100))
    assert len(run.freeze()) == MIN_EXAMPLES + 7


def test_what_the_disk_does_not_hold_is_trained(tmp_path: Path) -> None:
    run = HoldOut(tmp_path / "none", model="m", share=0.5)
    assert held_by(run, examples(100)) == []
    (tmp_path / "none").mkdir()
    assert held_by(run, examples(200)) == [each for each in examples(100, first=100) if is_chosen(each, 0.5)]
    assert not any(run.bars(each) for each in examples(100)), (
        "what was trained is not held out in a later epoch"
    )


def test_a_set_whose_examples_the_disk_refuses_again_and_again_stops_growing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hold_out, "MAX_REFUSED", 10)
    run = HoldOut(tmp_path / "none", model="m", share=0.5)
    assert held_by(run, examples(100)) == []
    (tmp_path / "none").mkdir()
    assert held_by(run, examples(200)) == []


def test_others_cannot_read_it(tmp_path: Path) -> None:
    assert held_by(HoldOut(tmp_path, model="m", share=0.5), examples(100))
    assert stat.S_IMODE((tmp_path / HOLD_OUT_FILE).stat().st_mode) == 0o600


def test_what_is_held_out_or_may_yet_be_does_not_train_by_another_way(tmp_path: Path) -> None:
    run = HoldOut(tmp_path, model="m", share=0.1)
    chosen = [each for each in examples(400) if is_chosen(each, 0.1)]
    assert [each for each in examples(400) if run.bars(each)] == chosen
    held = held_by(run, examples(300))
    assert len(held) < len(chosen) and run.freeze()
    assert [each for each in examples(400) if run.bars(each)] == held, "a frozen set takes no more"


def test_a_full_set_bars_no_more_than_it_has(tmp_path: Path) -> None:
    run = HoldOut(tmp_path, model="m", share=0.999)
    held = held_by(run, examples(MAX_EXAMPLES + 20))
    assert [each for each in examples(MAX_EXAMPLES + 20) if run.bars(each)] == held


def test_a_damaged_set_is_named(tmp_path: Path) -> None:
    (tmp_path / HOLD_OUT_FILE).write_text("{")
    with pytest.raises(ConfigurationError, match=HOLD_OUT_FILE):
        again(tmp_path, 0.1)


@given(st.lists(st.one_of(st.integers(0, 200), st.sampled_from(["freeze", "restart"])), max_size=60))
def test_no_example_that_was_held_out_trains_later(events: list[int | str]) -> None:
    """Whatever is published in whatever order; each number is an example."""
    with TemporaryDirectory() as folder:
        run, held = HoldOut(Path(folder), model="m", share=0.3), set[int]()
        for event in events:
            if event == "restart":
                run = again(Path(folder), 0.3)
            elif event == "freeze":
                run.freeze()
            else:
                (is_held_out,) = run.select(examples(1, first=int(event)))
                assert is_held_out or event not in held
                held |= {int(event)} if is_held_out else set()
