"""The answer to a completion request: one JSON body, or server-sent events."""

from collections.abc import Callable, Mapping, Sequence
from json.encoder import encode_basestring_ascii as quoted
from typing import Literal

from pydantic import BaseModel
from pydantic_core import to_json

from services.gateway.generation import Usage, Versions
from services.gateway.openai.answers import (
    Answer,
    ChoiceDetails,
    ChunkEncoder,
    Heading,
    Json,
    details_of,
)
from services.gateway.text.detokenise import Piece, TokenEntry
from shared.messages.inference import FinishReason
from shared.text import TextTokenizer


class CompletionLogprobs(BaseModel):
    """Four parallel lists, with one item for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Characters of the choice's own text before the token."""


class CompletionChoice(BaseModel):
    """One text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    lemix: ChoiceDetails


class Completion(Answer):
    """The answer of POST /v1/completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


def choice_of(index: int, pieces: Sequence[Piece], tokenizer: TextTokenizer, *, with_logprobs: bool) -> Json:
    """The fields of a CompletionChoice, put together from its pieces."""
    entries = [entry for piece in pieces for entry in piece.entries]
    return {
        "index": index,
        "text": "".join(piece.text for piece in pieces),
        "logprobs": logprobs_of(entries, tokenizer) if with_logprobs else None,
        "finish_reason": pieces[-1].finish,
        "lemix": details_of(pieces[-1].ranges),
    }


def logprobs_of(entries: Sequence[TokenEntry], tokenizer: TextTokenizer) -> Json:
    """The fields of CompletionLogprobs."""
    return {
        "tokens": [tokenizer.token_text(entry.token) for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [_top_of(entry, tokenizer) for entry in entries],
        "text_offset": [entry.text_offset for entry in entries],
    }


def _top_of(entry: TokenEntry, tokenizer: TextTokenizer) -> Mapping[str, float] | None:
    """The likeliest tokens and the chosen one; of tokens with the same text, the likelier."""
    if entry.logprob is None:
        return None
    top: dict[str, float] = {}
    for token, logprob in (*entry.top, (entry.token, entry.logprob)):
        text = tokenizer.token_text(token)
        top[text] = max(logprob, top.get(text, logprob))
    return top


class CompletionEvents(ChunkEncoder):
    """Makes the events of one stream."""

    def __init__(
        self,
        heading: Heading,
        tokenizer: TextTokenizer,
        *,
        include_usage: bool,
        with_logprobs: bool,
        usage_so_far: Callable[[], Usage] | None = None,
    ) -> None:
        super().__init__(heading, include_usage=include_usage, usage_so_far=usage_so_far)
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs

    def piece(self, index: int, piece: Piece, versions: Versions | None) -> bytes:
        """The event of one piece; no bytes when it has nothing to show."""
        if not (piece.text or piece.entries or piece.finish):
            return b""
        scores = "null"
        if self._with_logprobs:
            scores = to_json(logprobs_of(piece.entries, self._tokenizer)).decode()
        finish = f'"{piece.finish}"' if piece.finish else "null"
        choice = f'"text":{quoted(piece.text)},"logprobs":{scores},"finish_reason":{finish}'
        if piece.finish:
            choice += f',"lemix":{to_json(details_of(piece.ranges)).decode()}'
        return self.chunk(index, choice, versions)
