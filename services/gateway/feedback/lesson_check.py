"""Whether a lesson can be learnt from, checked before it is taken as the trainer will check it."""

import logging
from collections.abc import Sequence

from services.gateway.feedback.answers import Lesson
from services.gateway.feedback.batches import ENVELOPE_BYTES, SOURCE_BYTES
from shared.encoding import ExampleEncoder
from shared.errors import InvalidBatchError
from shared.examples import read_example

log = logging.getLogger(__name__)


def faults_of(lessons: Sequence[Lesson], encoder: ExampleEncoder, max_message_bytes: int) -> list[str]:
    """Why each of these cannot be learnt from; empty where it can. Blocks while it tokenises."""
    return [_fault(lesson, encoder, max_message_bytes) for lesson in lessons]


def _fault(lesson: Lesson, encoder: ExampleEncoder, max_message_bytes: int) -> str:
    room = max_message_bytes - ENVELOPE_BYTES - SOURCE_BYTES
    if len(lesson.line) > room:
        return f"has {len(lesson.line)} bytes with its conversation, at most {room} can be learnt at once"
    try:
        encoder.sequences(read_example(lesson.line))
    except InvalidBatchError as error:
        return str(error)
    except Exception as error:  # a tokenizer or template may raise anything
        log.exception("a correction cannot be encoded")
        return f"{type(error).__name__}: {error}"
    return ""
