"""The answer to a completion request: one JSON body, or server-sent events."""

from collections.abc import Sequence
from json.encoder import encode_basestring_ascii as quoted

from pydantic_core import to_json

from services.gateway.generation import Usage, Versions
from services.gateway.http.errors import ApiError
from services.gateway.openai.answers import DONE, Heading, Json, event, usage_fields
from services.gateway.text.detokenise import Piece, TokenEntry


def choice(index: int, pieces: Sequence[Piece], *, with_logprobs: bool) -> Json:
    """One whole choice, put together from its pieces."""
    entries = [entry for piece in pieces for entry in piece.entries]
    return {
        "index": index,
        "text": "".join(piece.text for piece in pieces),
        "logprobs": logprobs(entries) if with_logprobs else None,
        "finish_reason": pieces[-1].finish,
    }


def logprobs(entries: Sequence[TokenEntry]) -> Json:
    """OpenAI's four parallel lists; offsets count the characters of the choice's own text."""
    return {
        "tokens": [entry.token for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [entry.top for entry in entries],
        "text_offset": [entry.text_offset for entry in entries],
    }


class CompletionEvents:
    """Makes the events of one stream; what all of them share is encoded once."""

    def __init__(self, heading: Heading, *, include_usage: bool, with_logprobs: bool) -> None:
        self._heading = heading
        self._with_logprobs = with_logprobs
        self._include_usage = include_usage
        self._end = ',"usage":null}\n\n' if include_usage else "}\n\n"
        self._versions: Versions | None = None
        self._head = self._encode_head(None)

    def opening(self) -> bytes:
        """Nothing comes before the first piece."""
        return b""

    def piece(self, index: int, piece: Piece, versions: Versions | None) -> bytes:
        """The event of one piece; no bytes when it has nothing to show."""
        if not (piece.text or piece.entries or piece.finish):
            return b""
        if versions != self._versions:
            self._versions, self._head = versions, self._encode_head(versions)
        scores = to_json(logprobs(piece.entries)).decode() if self._with_logprobs else "null"
        finish = f'"{piece.finish}"' if piece.finish else "null"
        return (
            f'{self._head}{index},"text":{quoted(piece.text)},"logprobs":{scores},'
            f'"finish_reason":{finish}}}]{self._end}'
        ).encode()

    def ending(self, versions: Versions | None, usage: Usage) -> bytes:
        """What follows the last piece of a complete answer."""
        if not self._include_usage:
            return DONE
        fields = self._heading.fields(versions) | {"choices": [], "usage": usage_fields(usage)}
        return event(fields) + DONE

    def failure(self, error: ApiError) -> bytes:
        """The event that ends a stream whose answer stays incomplete."""
        return event(error.body())

    def _encode_head(self, versions: Versions | None) -> str:
        fields = to_json(self._heading.fields(versions)).decode()
        return f'data: {fields[:-1]},"choices":[{{"index":'
