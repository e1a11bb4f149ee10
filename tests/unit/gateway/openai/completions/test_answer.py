"""The log-probabilities of completions."""

from typing import Any

from services.gateway.openai.completions.answer import logprobs_of
from services.gateway.text.detokenise import TokenEntry
from tests.support.gateway import TOKENIZER


def told_of(*entries: TokenEntry) -> Any:
    return logprobs_of(entries, TOKENIZER)


def test_the_chosen_token_is_always_among_the_top() -> None:
    chosen, other = TOKENIZER.encode("x")[0], TOKENIZER.encode("y")[0]
    [top] = told_of(TokenEntry(chosen, -5.0, ((other, -0.1),), 0))["top_logprobs"]
    assert top == {"x": -5.0, "y": -0.1}


def test_the_first_token_of_a_prompt_has_no_top() -> None:
    told = told_of(TokenEntry(TOKENIZER.encode("x")[0], None, (), 0))
    assert (told["token_logprobs"], told["top_logprobs"]) == ([None], [None])


def test_pieces_of_characters_have_keys_of_their_own() -> None:
    pieces = TOKENIZER.encode("😀")
    assert len(pieces) > 1
    top = tuple((token, -float(k)) for k, token in enumerate(pieces))
    [keys] = told_of(TokenEntry(pieces[0], -0.0, top, 0))["top_logprobs"]
    assert len(keys) == len(set(pieces))
    assert all(key.startswith("bytes:") for key in keys)


def test_of_tokens_with_the_same_text_the_likelier_is_told(monkeypatch) -> None:
    monkeypatch.setattr(TOKENIZER, "token_text", lambda token: "same")
    [top] = told_of(TokenEntry(1, -3.0, ((2, -1.0), (1, -3.0)), 0))["top_logprobs"]
    assert top == {"same": -1.0}
