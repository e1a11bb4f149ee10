"""Held-back text, echo and log-probabilities of one sequence."""

from math import inf, nan

import pytest
from msgspec import structs

from services.gateway.text.detokenise import Detokeniser, Piece, TokenEntry
from shared.errors import RefusedError
from shared.messages.inference import FinishReason, SequenceResult, TokenLogprob
from tests.support.gateway import CARD, TOKENIZER

EOS = CARD.eos_token_ids[0]


def results(tokens: list[int], last: FinishReason) -> list[SequenceResult]:
    """The tokens as a stage tells of them."""
    produced = [TokenLogprob(token=token, logprob=-0.5, top=((token, -0.5), (EOS, -3.0))) for token in tokens]
    told = [SequenceResult(task_id="t", token=token, index=index) for index, token in enumerate(produced)]
    return [*told[:-1], structs.replace(told[-1], finish=last)]


def feed(sequence: Detokeniser, told: list[SequenceResult]) -> list[Piece]:
    """Apply results until the sequence ends."""
    pieces = []
    for result in told:
        pieces.append(sequence.apply(result))
        if sequence.finished:
            break
    return pieces


def play(sequence: Detokeniser, tokens: list[int], last: FinishReason) -> list[Piece]:
    """Feed tokens until the sequence ends."""
    return feed(sequence, results(tokens, last))


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_answer_is_cut_exactly_before_a_stop_string_that_spans_tokens() -> None:
    tokens = TOKENIZER.encode("The end is near; or is it not?")
    sequence = Detokeniser(TOKENIZER, [EOS], max_tokens=len(tokens), stops=["near; o"])
    pieces = play(sequence, tokens, "length")
    assert text_of(pieces) == "The end is "
    assert pieces[-1].finish == "stop"


def test_a_beginning_of_a_stop_string_is_shown_when_the_answer_ends() -> None:
    tokens = TOKENIZER.encode("wait for it")
    sequence = Detokeniser(TOKENIZER, [EOS], max_tokens=len(tokens), stops=["it now"])
    pieces = play(sequence, tokens, "length")
    assert (text_of(pieces), pieces[-1].finish) == ("wait for it", "length")


def test_end_token_has_no_text() -> None:
    tokens = [*TOKENIZER.encode("so be it"), EOS]
    sequence = Detokeniser(TOKENIZER, [EOS], max_tokens=50)
    pieces = play(sequence, tokens, "stop")
    assert (text_of(pieces), pieces[-1].finish) == ("so be it", "stop")
    assert sequence.num_tokens == len(tokens)


def test_unfinished_character_is_shown_at_the_end_only() -> None:
    tokens = TOKENIZER.encode("a😀")[:-1]
    sequence = Detokeniser(TOKENIZER, [EOS], max_tokens=len(tokens))
    pieces = play(sequence, tokens, "length")
    assert text_of(pieces[:-1]).strip("a") == ""
    assert text_of(pieces).rstrip("\ufffd") == "a"


def test_entries_follow_the_text_and_end_with_it() -> None:
    tokens = TOKENIZER.encode("The end is near; or is it not?")
    sequence = Detokeniser(TOKENIZER, [EOS], max_tokens=len(tokens), stops=[" near"], with_logprobs=True)
    shown = ""
    entries: list[TokenEntry] = []
    for piece in play(sequence, tokens, "length"):
        shown += piece.text
        entries += piece.entries
        assert all(entry.text_offset < len(shown) for entry in entries)
    texts = [TOKENIZER.token_text(entry.token) for entry in entries]
    assert "".join(texts) == shown == "The end is"
    offsets = [entry.text_offset for entry in entries]
    assert [shown[offset:].startswith(text) for offset, text in zip(offsets, texts, strict=True)] == [
        True
    ] * 3


def test_echo_with_scores_begins_with_an_unscored_token() -> None:
    prompt = TOKENIZER.encode("Once upon a time")
    sequence = Detokeniser(TOKENIZER, prompt, max_tokens=0, with_logprobs=True, echo="Once upon a time")
    scores = tuple(TokenLogprob(token=token, logprob=-2.0) for token in prompt[1:])
    first = sequence.apply(SequenceResult(task_id="t", prompt=scores[:1]))
    last = sequence.apply(SequenceResult(task_id="t", prompt=scores[1:], finish="length"))
    entries = first.entries + last.entries
    assert first.text + last.text == "Once upon a time"
    assert [entry.logprob for entry in entries] == [None] + [-2.0] * len(scores)
    assert (entries[0].top, entries[0].text_offset) == ((), 0)
    assert [entry.token for entry in entries] == prompt


def scored(logprob: float, top: tuple[tuple[int, float], ...] = ()) -> SequenceResult:
    return SequenceResult(task_id="t", token=TokenLogprob(token=7, logprob=logprob, top=top), finish="length")


def test_infinities_have_a_number_in_json() -> None:
    sequence = Detokeniser(TOKENIZER, [EOS], max_tokens=1, with_logprobs=True)
    [entry] = sequence.apply(scored(-inf, ((5, -1.0), (6, -inf)))).entries
    assert (entry.logprob, entry.top) == (-9999.0, ((5, -1.0), (6, -9999.0)))


@pytest.mark.parametrize("result", [scored(nan), scored(-1.0, ((5, nan),))])
def test_a_log_probability_that_is_no_number_is_an_error(result: SequenceResult) -> None:
    sequence = Detokeniser(TOKENIZER, [EOS], max_tokens=1, with_logprobs=True)
    with pytest.raises(RefusedError, match="no number") as caught:
        sequence.apply(result)
    assert caught.value.code == 500


def test_the_token_that_ends_a_text_is_known_as_such() -> None:
    tokens = [*TOKENIZER.encode("so"), EOS]
    sequence = Detokeniser(TOKENIZER, [EOS], max_tokens=9, with_logprobs=True)
    entries = [entry for piece in play(sequence, tokens, "stop") for entry in piece.entries]
    assert [entry.ends_text for entry in entries] == [False] * (len(tokens) - 1) + [True]


@pytest.mark.parametrize("lost", [0, 2, 3])
@pytest.mark.parametrize("last", ["length", "stop"])
def test_lost_tokens_are_an_error_and_not_a_shorter_answer(last: FinishReason, lost: int) -> None:
    told = results([*TOKENIZER.encode("one two three four"), EOS], last)
    sequence = Detokeniser(TOKENIZER, [EOS], max_tokens=len(told))
    with pytest.raises(RefusedError, match="lost"):
        feed(sequence, told[:lost] + told[lost + 1 :])


def test_only_the_newest_token_is_known_as_a_repetition() -> None:
    first, second, *_ = results(TOKENIZER.encode("one two three"), "length")
    sequence = Detokeniser(TOKENIZER, [EOS], max_tokens=9)
    assert not sequence.repeats(first)
    sequence.apply(first)
    assert sequence.repeats(first)
    assert not sequence.repeats(second)
    sequence.apply(second)
    assert not sequence.repeats(first)
    with pytest.raises(RefusedError, match="lost"):
        sequence.apply(first)


def test_scores_that_come_twice_are_an_error() -> None:
    sequence = Detokeniser(TOKENIZER, [1, 2], max_tokens=0, with_logprobs=True, echo="")
    scored = SequenceResult(task_id="t", prompt=(TokenLogprob(token=2),))
    sequence.apply(scored)
    with pytest.raises(RefusedError, match="lost"):
        sequence.apply(structs.replace(scored, finish="length"))


def test_lost_scores_are_an_error() -> None:
    sequence = Detokeniser(TOKENIZER, [1, 2, 3], max_tokens=0, with_logprobs=True, echo="")
    with pytest.raises(RefusedError, match="lost"):
        sequence.apply(SequenceResult(task_id="t", prompt=(TokenLogprob(token=3),), finish="length"))
