"""The held-out examples: a file of them, one JSON example a line, in the forms of a training batch."""

from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from shared.encoding import ExampleEncoder, LabelledTokens
from shared.errors import ConfigurationError, InvalidBatchError
from shared.examples import Example

_EXAMPLE: TypeAdapter[Example] = TypeAdapter(Example)


def read_held_out(path: Path, encoder: ExampleEncoder) -> list[LabelledTokens]:
    """Raises ConfigurationError, naming the line that is wrong."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"LEMIX_HELD_OUT: cannot read {path}: {error}") from error
    examples = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                examples.append(encoder.encode(_EXAMPLE.validate_json(line)))
            except (ValidationError, InvalidBatchError) as error:
                raise ConfigurationError(
                    f"LEMIX_HELD_OUT: {path}, line {number}: {_reason(error)}"
                ) from error
    if not examples:
        raise ConfigurationError(f"LEMIX_HELD_OUT: {path} has no examples")
    return examples


def _reason(error: ValidationError | InvalidBatchError) -> str:
    if isinstance(error, InvalidBatchError):
        return str(error)
    return error.errors(include_url=False, include_input=False, include_context=False)[0]["msg"]
