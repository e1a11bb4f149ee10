"""The book-keeping of one sequence: tokens in, text out, stop strings, log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan

from services.gateway.text.stops import split_at_stop
from services.gateway.version_ranges import VersionRange
from shared.errors import RefusedError
from shared.messages.inference import FinishReason, SequenceResult, TokenLogprob
from shared.text import TextTokenizer


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """One token, as log-probabilities show it."""

    token: int
    logprob: float | None
    """None for the first token of a prompt: nothing predicts it."""
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens there, with their log-probabilities."""
    text_offset: int
    """Characters of the choice's text before this token."""
    ends_text: bool = False
    """The model ended the text with it: it is not shown."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The text that may be shown to the client now."""

    text: str
    entries: tuple[TokenEntry, ...]
    finish: FinishReason | None
    ranges: tuple[VersionRange, ...] = ()
    """With the last piece: which weights made the tokens of the sequence."""


class Detokeniser:
    """Turns the tokens of one sequence into what may be shown, from the first token to the last."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        stops: Sequence[str] = (),
        with_logprobs: bool = False,
        echo: str | None = None,
    ) -> None:
        """`echo` is the prompt's text, to be shown before the completion (None: not shown)."""
        self._max_tokens = max_tokens
        self._stops = stops
        self._with_logprobs = with_logprobs
        self._stream = tokenizer.stream(prompt)
        self._echo = echo or ""
        self._prompt = _PromptScores(tokenizer, prompt) if echo is not None and with_logprobs else None
        self._held = ""
        self._entries: list[TokenEntry] = []
        self._decoded_length = self._shown_length = len(self._echo)
        self.num_tokens = 0
        """Tokens generated so far."""
        self.finished = False
        self._newest: SequenceResult | None = None

    def repeats(self, result: SequenceResult) -> bool:
        """Whether this is the newest token once more."""
        is_old = result.index < self.num_tokens  # asked first, as it costs nothing
        return is_old and result.token is not None and result == self._newest

    def apply(self, result: SequenceResult) -> Piece:
        """Take in what an iteration produced. Raises RefusedError when a part of the answer is missing."""
        if result.index != self.num_tokens:
            raise _lost()
        self._newest = result
        scores = () if self._prompt is None else self._prompt.take(result.prompt)
        text = "" if result.token is None else self._take(result.token, result.finish)
        if result.finish is not None:
            self._check_complete(result.finish)
            text += self._stream.flush()
        return self._show(scores, text, result.finish)

    def _take(self, produced: TokenLogprob, finish: FinishReason | None) -> str:
        self.num_tokens += 1
        if self._with_logprobs:
            self._entries.append(_entry(produced, self._decoded_length, ends_text=finish == "stop"))
        return "" if finish == "stop" else self._stream.push(produced.token)

    def _check_complete(self, finish: FinishReason) -> None:
        unscored = self._prompt is not None and self._prompt.num_left != 0
        if unscored or (finish == "length" and self.num_tokens != self._max_tokens):
            raise _lost()

    def _show(self, scores: tuple[TokenEntry, ...], text: str, finish: FinishReason | None) -> Piece:
        self._decoded_length += len(text)
        shown, self._held, stopped = split_at_stop(self._held + text, self._stops)
        if stopped:
            finish = "stop"
        elif finish is not None:
            shown, self._held = shown + self._held, ""
        self._shown_length += len(shown)
        shown, self._echo = self._echo + shown, ""
        self.finished = finish is not None
        return Piece(shown, scores + self._entries_shown(stopped), finish)

    def _entries_shown(self, stopped: bool) -> tuple[TokenEntry, ...]:
        """Entries of the tokens whose text is shown; tokens behind a stop string have none."""
        entries = self._entries
        if not entries:
            return ()
        hides_some = stopped or self._held
        num_shown = len(entries)
        if hides_some:
            num_shown = sum(entry.text_offset < self._shown_length for entry in entries)
        self._entries = entries[num_shown:]
        return tuple(entries[:num_shown])


class _PromptScores:
    """The entries of a prompt's tokens, in order, as the chunks of the prompt are run."""

    def __init__(self, tokenizer: TextTokenizer, prompt: Sequence[int]) -> None:
        self._stream = tokenizer.stream()
        self._offset = 0
        first = TokenEntry(prompt[0], None, (), self._advance(prompt[0]))
        self._unsent: tuple[TokenEntry, ...] = (first,)
        self.num_left = len(prompt) - 1

    def take(self, scored: tuple[TokenLogprob, ...]) -> tuple[TokenEntry, ...]:
        entries = tuple(_entry(item, self._advance(item.token)) for item in scored)
        entries, self._unsent = self._unsent + entries, ()
        self.num_left -= len(scored)
        return entries

    def _advance(self, token: int) -> int:
        """Characters before `token`."""
        before = self._offset
        self._offset += len(self._stream.push(token))
        return before


def _lost() -> RefusedError:
    return RefusedError("a part of the answer was lost on its way", code=502)


def _entry(scored: TokenLogprob, text_offset: int, *, ends_text: bool = False) -> TokenEntry:
    top = tuple((token, _in_json(logprob)) for token, logprob in scored.top)
    logprob = 0.0 if scored.logprob is None else _in_json(scored.logprob)
    return TokenEntry(scored.token, logprob, top, text_offset, ends_text)


def _in_json(logprob: float) -> float:
    """JSON has no infinity; for what cannot happen OpenAI says -9999. Raises RefusedError for NaN."""
    if isnan(logprob):
        raise RefusedError("the model gave a log-probability that is no number", code=500)
    return max(logprob, -9999.0)
