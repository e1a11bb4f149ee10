"""The answer as it goes over HTTP: one JSON body, or server-sent events."""

from collections.abc import Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as quoted

from pydantic_core import to_json

from services.gateway.http.errors import ApiError
from services.gateway.text.detokenise import Piece, TokenEntry

Json = dict[str, object]

DONE = b"data: [DONE]\n\n"
VERSION_HEADER = "lemix-weights-version"
"""Of the first and the last token, as `3-5`; of a stream, which cannot know its end, of the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """What stands at the top of the answer and of every event."""

    completion_id: str
    created_s: int
    """Seconds since the Unix epoch."""
    model: str

    def fields(self, versions: tuple[int, int] | None) -> Json:
        """The JSON fields before the choices."""
        return {
            "id": self.completion_id,
            "object": "text_completion",
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": fingerprint(versions),
        }


def fingerprint(versions: tuple[int, int] | None) -> str | None:
    """The weights that made the answer's first and last token; None when nothing was computed."""
    return None if versions is None else f"weights-{versions[0]}-{versions[1]}"


def usage(num_prompt_tokens: int, num_completion_tokens: int) -> Json:
    """OpenAI's count of tokens."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
    }


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


class EventEncoder:
    """Makes the events of one stream; what all of them share is encoded once."""

    def __init__(self, heading: Heading, *, include_usage: bool, with_logprobs: bool) -> None:
        self._heading = heading
        self._with_logprobs = with_logprobs
        self._include_usage = include_usage
        self._end = ',"usage":null}\n\n' if include_usage else "}\n\n"
        self._versions: tuple[int, int] | None = None
        self._head = self._encode_head(None)

    def chunk(self, index: int, piece: Piece, versions: tuple[int, int] | None) -> bytes:
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

    def ending(self, versions: tuple[int, int] | None, counts: Json) -> bytes:
        """What follows the last chunk of a complete answer."""
        if not self._include_usage:
            return DONE
        return _event(self._heading.fields(versions) | {"choices": [], "usage": counts}) + DONE

    def _encode_head(self, versions: tuple[int, int] | None) -> str:
        fields = to_json(self._heading.fields(versions)).decode()
        return f'data: {fields[:-1]},"choices":[{{"index":'


def error_event(error: ApiError) -> bytes:
    """The event that ends a stream whose answer stays incomplete."""
    return _event(error.body())


def _event(content: object) -> bytes:
    return b"data: " + to_json(content) + b"\n\n"
