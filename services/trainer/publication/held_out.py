"""The held-out examples: a file of them, one JSON example a line, in the forms of a training batch."""

from pathlib import Path

from shared.encoding import ExampleEncoder, LabelledTokens
from shared.errors import ConfigurationError, InvalidBatchError
from shared.examples import AnyExample, Example, Preference, numbered_lines, read_example


def read_held_out(path: Path, encoder: ExampleEncoder) -> list[LabelledTokens]:
    """Read the held-out examples. Raises ConfigurationError, naming the line that is wrong."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"LEMIX_HELD_OUT: cannot read {path}: {error}") from error
    examples = []
    for number, line in numbered_lines(content):
        try:
            examples.append(encoder.encode(_without_preferences(read_example(line))))
        except InvalidBatchError as error:
            raise ConfigurationError(f"LEMIX_HELD_OUT: {path}, line {number}: {error}") from error
    if not examples:
        raise ConfigurationError(f"LEMIX_HELD_OUT: {path} has no examples")
    return examples


def _without_preferences(example: AnyExample) -> Example:
    if isinstance(example, Preference):
        raise InvalidBatchError("a preference has no loss without a reference: hold out ordinary examples")
    return example
