"""What the answers of all routes that generate have in common."""

from dataclasses import dataclass

from pydantic_core import to_json

from services.gateway.generation import Usage, Versions

Json = dict[str, object]

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """What stands at the top of the answer and of every event."""

    answer_id: str
    kind: str
    """OpenAI's name of the object: `text_completion`."""
    created_s: int
    """Seconds since the Unix epoch."""
    model: str

    def fields(self, versions: Versions | None) -> Json:
        """The JSON fields before the choices."""
        return {
            "id": self.answer_id,
            "object": self.kind,
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": fingerprint(versions),
        }


def fingerprint(versions: Versions | None) -> str | None:
    """The weights that made the answer's first and last token; None when nothing was computed."""
    return None if versions is None else f"weights-{versions.first}-{versions.last}"


def usage_fields(usage: Usage) -> Json:
    """OpenAI's count of tokens."""
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_generated_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_generated_tokens,
    }


def event(content: object) -> bytes:
    """A server-sent event of a JSON value."""
    return b"data: " + to_json(content) + b"\n\n"
