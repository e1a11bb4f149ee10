"""Samples that a model writes itself: how they are drawn, kept on the disk, and begun."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from services.trainer.publication.openings import openings
from services.trainer.publication.samples import Drawing, Samples
from services.trainer.publication.samples_file import SAMPLES_FILE, read_samples, write_samples
from shared.chat_template import ChatTemplate
from shared.clock import SystemClock
from shared.encoding import ExampleEncoder, LabelledTokens
from shared.errors import ConfigurationError
from shared.messages.inference import FinishReason, SequenceResult, TokenLogprob
from shared.model_files import read_card
from shared.settings import EMBEDDED_MODEL
from shared.text import TextTokenizer

FOLDER = Path(EMBEDDED_MODEL)
TOKENIZER = TextTokenizer.load(FOLDER)
PLAIN = "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}<assistant>"
FOR_TWO = "{% if messages | length < 2 %}{{ raise_exception('two, please') }}{% endif %}"


def encoder(template: str | None = None, *, tokenizer: TextTokenizer | None = TOKENIZER) -> ExampleEncoder:
    chat = None if template is None else ChatTemplate({"default": template}, {}, SystemClock())
    card = read_card(FOLDER, "m")
    return ExampleEncoder(card=card, max_tokens=64, tokenizer=tokenizer, chat_template=chat)


def drawing(*prompts: tuple[int, ...], max_tokens: int = 100) -> Drawing:
    return Drawing("d", 3, prompts, max_tokens=max_tokens, stop_token_ids=(2,))


def drew(
    which: Drawing,
    task_id: str,
    tokens: Sequence[int],
    *,
    first: int = 0,
    logprob: float | None = -0.5,
    finish: FinishReason | None = None,
) -> None:
    for index, token in enumerate(tokens, start=first):
        chosen = TokenLogprob(token=token, logprob=logprob)
        is_last = index == first + len(tokens) - 1
        which.drew(
            SequenceResult(task_id=task_id, token=chosen, index=index, finish=finish if is_last else None)
        )


def test_a_sample_ends_with_its_stop_token_which_counts() -> None:
    one = drawing((1, 4))
    assert list(one.next()) == ["d-0"]
    drew(one, "d-0", [6, 2], finish="stop")
    assert one.samples == Samples(3, 0.5, (LabelledTokens((1, 4, 6, 2), (1, 2)),))
    assert not list(one.asked)


@pytest.mark.parametrize(("first", "logprob"), [(1, -0.5), (0, None)])
def test_a_sample_that_lost_something_is_drawn_again(first: int, logprob: float | None) -> None:
    one = drawing((1,))
    (asked,) = one.next().values()
    drew(one, "d-0", [6, 6], first=first, logprob=logprob, finish="length")
    assert one.samples is None
    assert one.next() == {"d-1": asked}, "with the same seed"
    drew(one, "d-0", [6], finish="length")
    assert one.samples is None, "the task before may still run"
    drew(one, "d-1", [7], finish="length")
    assert one.samples == Samples(3, 0.5, (LabelledTokens((1, 7), (0,)),))


def test_prompt_and_sample_fit_the_context() -> None:
    one = drawing((1, 2, 3, 4), (1,), max_tokens=3)
    asked = [(prompt, sampling.max_tokens) for prompt, sampling in one.next().values()]
    assert asked == [((1, 2), 1), ((1,), 2)]


def test_what_nobody_asked_for_is_no_sample() -> None:
    one = drawing((1,))
    one.next()
    drew(one, "other", [6], finish="stop")
    assert one.samples is None


def test_samples_come_back_from_the_disk_for_their_model(tmp_path: Path) -> None:
    samples = Samples(3, 0.5, (LabelledTokens((1, 7, 8), (0, 1)),))
    assert read_samples(tmp_path, model="m") is None
    write_samples(tmp_path, samples, model="m")
    assert read_samples(tmp_path, model="m") == samples
    assert read_samples(tmp_path, model="another") is None


def test_damaged_samples_are_named(tmp_path: Path) -> None:
    (tmp_path / SAMPLES_FILE).write_text('{"model": "m"}')
    with pytest.raises(ConfigurationError, match=SAMPLES_FILE):
        read_samples(tmp_path, model="m")


def test_a_chat_model_is_asked_everyday_questions() -> None:
    begun = openings(encoder(PLAIN), 18)
    assert TOKENIZER.decode(begun[0]) == "<user>What is the capital of France?\n<assistant>"
    assert (begun[0], begun[1]) == (begun[16], begun[17]), "they come again, with other seeds"


@pytest.mark.parametrize("template", [None, FOR_TWO])
def test_another_model_goes_on_with_beginnings_of_texts(template: str | None) -> None:
    assert openings(encoder(template), 2) == [tuple(TOKENIZER.encode(text)) for text in ("The", "In the")]


def test_a_model_without_a_tokenizer_writes_nothing() -> None:
    assert openings(encoder(PLAIN, tokenizer=None), 16) == []
