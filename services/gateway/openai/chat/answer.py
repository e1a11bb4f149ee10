"""The answer to a chat request: one JSON body, or server-sent events."""

from collections.abc import Callable, Sequence
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
from services.gateway.openai.chat.request import ChatRequest
from services.gateway.openai.tool_calls import Delta, TextDelta, ToolCallDelta, ToolCallParser
from services.gateway.text.detokenise import Piece, TokenEntry
from services.gateway.version_ranges import VersionRange
from shared.clock import IdSource
from shared.text import TextTokenizer

ChatFinishReason = Literal["stop", "length", "tool_calls"]


class FunctionCalled(BaseModel):
    """A function, and the arguments to call it with."""

    name: str
    arguments: str
    """A JSON object."""


class ToolCalled(BaseModel):
    """A call that the model makes."""

    id: str
    type: Literal["function"]
    function: FunctionCalled


class AssistantAnswer(BaseModel):
    """The model's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCalled] = []
    """Missing when there are none."""


class LikelyToken(BaseModel):
    """A token that could stand in this place."""

    token: str
    logprob: float
    bytes: list[int]


class ScoredToken(LikelyToken):
    """A token of the text, and the likeliest ones in its place."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(BaseModel):
    """The tokens of the text."""

    content: list[ScoredToken]
    refusal: None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantAnswer
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    lemix: ChoiceDetails


class ChatCompletion(Answer):
    """The answer of POST /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ChoiceReader:
    """Divides one choice, piece by piece, into text and calls of tools."""

    def __init__(self, parser: ToolCallParser | None, *, parallel_calls: bool) -> None:
        """Without a parser all is text; without parallel calls the first one counts."""
        self._parser = parser
        self._parallel_calls = parallel_calls
        self._has_called = False

    def read(self, piece: Piece) -> tuple[list[Delta], ChatFinishReason | None]:
        """The deltas that a piece adds, and why the choice ends if it does."""
        deltas = [delta for delta in self._divide(piece) if self._wants(delta)]
        self._has_called = self._has_called or any(isinstance(delta, ToolCallDelta) for delta in deltas)
        return deltas, "tool_calls" if piece.finish == "stop" and self._has_called else piece.finish

    def _divide(self, piece: Piece) -> Sequence[Delta]:
        if self._parser is None:
            return [TextDelta(piece.text)] if piece.text else []
        deltas = self._parser.push(piece.text)
        return deltas if piece.finish is None else deltas + self._parser.finish()

    def _wants(self, delta: Delta) -> bool:
        return self._parallel_calls or isinstance(delta, TextDelta) or delta.index == 0


def reader_of(asked: ChatRequest, ids: IdSource) -> ChoiceReader:
    """The reader of one choice of the answer to a request."""
    parser = ToolCallParser(lambda: ids.new("call")) if asked.may_call_tools else None
    return ChoiceReader(parser, parallel_calls=asked.parallel_tool_calls)


def choice_of(
    index: int,
    pieces: Sequence[Piece],
    reader: ChoiceReader,
    tokenizer: TextTokenizer,
    *,
    with_logprobs: bool,
) -> Json:
    """The fields of a ChatChoice, put together from its pieces."""
    read = [reader.read(piece) for piece in pieces]
    deltas = [delta for found, _ in read for delta in found]
    entries = [entry for piece in pieces for entry in piece.entries]
    return {
        "index": index,
        "message": _message_of(deltas),
        "logprobs": logprobs_of(entries, tokenizer) if with_logprobs else None,
        "finish_reason": read[-1][1],
        "lemix": details_of(pieces[-1].ranges),
    }


def _message_of(deltas: Sequence[Delta]) -> Json:
    text = "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))
    calls = [_call_of(delta) for delta in deltas if isinstance(delta, ToolCallDelta)]
    message: Json = {"role": "assistant", "content": text, "refusal": None}
    if calls:
        message |= {"content": text or None, "tool_calls": calls}
    return message


def _call_of(call: ToolCallDelta) -> Json:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def logprobs_of(entries: Sequence[TokenEntry], tokenizer: TextTokenizer) -> Json:
    """The fields of ChatLogprobs."""
    return {"content": scored_tokens(entries, tokenizer), "refusal": None}


def scored_tokens(entries: Sequence[TokenEntry], tokenizer: TextTokenizer) -> list[Json]:
    """The fields of each ScoredToken; the token that ends a text is not part of it."""
    return [_scored(entry, tokenizer) for entry in entries if not entry.ends_text]


def _scored(entry: TokenEntry, tokenizer: TextTokenizer) -> Json:
    assert entry.logprob is not None, "only the first token of a prompt has none"
    top = [_token(token, logprob, tokenizer) for token, logprob in entry.top]
    return _token(entry.token, entry.logprob, tokenizer) | {"top_logprobs": top}


def _token(token: int, logprob: float, tokenizer: TextTokenizer) -> Json:
    return {
        "token": tokenizer.token_text(token),
        "logprob": logprob,
        "bytes": list(tokenizer.token_bytes(token)),
    }


class ChatEvents(ChunkEncoder):
    """Makes the events of one stream."""

    def __init__(
        self,
        heading: Heading,
        readers: Sequence[ChoiceReader],
        tokenizer: TextTokenizer,
        *,
        include_usage: bool,
        with_logprobs: bool,
        usage_so_far: Callable[[], Usage] | None = None,
    ) -> None:
        """`readers`: one for each choice."""
        super().__init__(heading, include_usage=include_usage, usage_so_far=usage_so_far)
        self._readers = readers
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs

    def opening(self, versions: Versions | None) -> bytes:
        """The events that say who speaks, for each choice."""
        role: Json = {"role": "assistant", "content": "", "refusal": None}
        return b"".join(self._delta(index, role, versions) for index in range(len(self._readers)))

    def piece(self, index: int, piece: Piece, versions: Versions | None) -> bytes:
        """The events of one piece; no bytes when it has nothing to show."""
        found, finish = self._readers[index].read(piece)
        deltas = [_delta_of(delta) for delta in found]
        scores = None
        if self._with_logprobs and piece.entries:
            scores = logprobs_of(piece.entries, self._tokenizer)
            deltas = deltas or [{"content": ""}]
        events = [
            self._delta(index, delta, versions, logprobs=None if place else scores)
            for place, delta in enumerate(deltas)
        ]
        if finish is not None:
            events.append(self._delta(index, {}, versions, finish=finish, ranges=piece.ranges))
        return b"".join(events)

    def _delta(
        self,
        index: int,
        delta: Json,
        versions: Versions | None,
        *,
        logprobs: Json | None = None,
        finish: str | None = None,
        ranges: Sequence[VersionRange] = (),
    ) -> bytes:
        fields = {"delta": delta, "logprobs": logprobs, "finish_reason": finish}
        choice = to_json(fields if finish is None else {**fields, "lemix": details_of(ranges)})
        return self.chunk(index, choice[1:-1].decode(), versions)


def _delta_of(delta: Delta) -> Json:
    if isinstance(delta, TextDelta):
        return {"content": delta.text}
    return {"tool_calls": [{"index": delta.index, **_call_of(delta)}]}
