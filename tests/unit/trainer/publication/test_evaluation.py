"""The loss of a version on the held-out examples, from what stages tell of them."""

from pathlib import Path

import pytest

from services.trainer.publication.evaluation import MAX_ASKED, Evaluation
from services.trainer.publication.held_out import read_held_out
from shared.encoding import ExampleEncoder, LabelledTokens
from shared.errors import ConfigurationError
from shared.messages.inference import SequenceResult, TokenLogprob
from shared.model_files import read_card
from shared.settings import EMBEDDED_MODEL

EXAMPLES = [LabelledTokens((5, 6, 7), (0, 1)), LabelledTokens((1, 2, 3, 4), (2,))]


def result(task_id: str, *logprobs: float | None) -> SequenceResult:
    prompt = tuple(TokenLogprob(token=0, logprob=logprob) for logprob in logprobs)
    return SequenceResult(task_id=task_id, prompt=prompt, finish="length")


def test_the_loss_is_the_mean_over_all_learnt_tokens() -> None:
    evaluation = Evaluation("e", EXAMPLES)
    assert evaluation.next() == {"e-0-0": (5, 6, 7), "e-0-1": (1, 2, 3, 4)}
    assert evaluation.scored(result("e-0-1", -100.0, -100.0, -4.0))
    assert evaluation.losses is None
    assert evaluation.scored(result("e-0-0", -1.0, -3.0))
    assert (evaluation.losses or []) == [pytest.approx((1 + 3 + 4) / 3)]


def test_only_so_many_examples_are_out_at_once() -> None:
    evaluation = Evaluation("e", EXAMPLES[:1] * (MAX_ASKED + 1))
    assert len(evaluation.next()) == MAX_ASKED
    assert evaluation.next() == {}
    evaluation.scored(result("e-0-3", -1.0, -1.0))
    assert list(evaluation.next()) == [f"e-0-{MAX_ASKED}"]


def test_a_task_that_comes_twice_counts_once() -> None:
    evaluation = Evaluation("e", EXAMPLES[:1])
    evaluation.next()
    assert evaluation.scored(result("e-0-0", -1.0, -1.0))
    assert not evaluation.scored(result("e-0-0", -9.0, -9.0))
    assert not evaluation.scored(result("another", -9.0, -9.0))
    assert (evaluation.losses or []) == [pytest.approx(1.0)]


@pytest.mark.parametrize("logprobs", [(), (-1.0,), (-1.0, None)])
def test_what_failed_or_came_in_part_is_asked_again(logprobs: tuple[float | None, ...]) -> None:
    evaluation = Evaluation("e", EXAMPLES[:1])
    evaluation.next()
    assert not evaluation.scored(result("e-0-0", *logprobs))
    assert evaluation.losses is None
    assert list(evaluation.next()) == ["e-0-0"]
    evaluation.failed("e-0-0")
    evaluation.failed("e-0-0")
    assert list(evaluation.next()) == ["e-0-0"]
    evaluation.scored(result("e-0-0", -1.0, -2.0))
    assert (evaluation.losses or []) == [pytest.approx(1.5)]


ENCODER = ExampleEncoder(
    card=read_card(Path(EMBEDDED_MODEL), "m"), max_tokens=8, tokenizer=None, chat_template=None
)


def test_held_out_examples_are_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "held_out.jsonl"
    path.write_text('{"token_ids": [1, 2, 3]}\n\n{"token_ids": [4, 5]}\n')
    assert [example.tokens for example in read_held_out(path, ENCODER)] == [(1, 2, 3), (4, 5)]


PREFERENCE = (
    '{"input": {"messages": [{"role": "user", "content": "hi"}]}, '
    '"preferred_output": [{"role": "assistant", "content": "ho"}], '
    '"non_preferred_output": [{"role": "assistant", "content": "hum"}]}'
)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("\n", "has no examples"),
        ('{"token_ids": [1, 2]}\n{"token_ids": 3}', "line 2: token_ids: Input should be a valid array"),
        ('{"words": 3}', "line 1: has none of the keys"),
        ("no json", "line 1: Invalid JSON"),
        (PREFERENCE, "line 1: a preference has no loss without a reference"),
        ('{"token_ids": [1, 2, 3, 4, 5, 6, 7, 8, 9]}', "line 1: .*8"),
    ],
)
def test_a_line_that_is_no_example_is_named(content: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "held_out.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=reason):
        read_held_out(path, ENCODER)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot read .*nowhere"):
        read_held_out(tmp_path / "nowhere", ENCODER)
