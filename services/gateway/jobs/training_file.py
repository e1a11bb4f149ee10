"""A training file as the examples in it: checked line by line, cut into batches."""

import json
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from services.gateway.jobs.job import Job, JobError
from shared.encoding import ExampleEncoder
from shared.errors import InvalidBatchError, LemixError
from shared.examples import AnyExample, Preference, numbered_lines, read_example

MAX_FAULTS_SHOWN = 10
MAX_FAULT_CHARACTERS = 300
ENVELOPE_BYTES = 1024
"""More than a batch has around its examples, headers of its message included."""

log = logging.getLogger(__name__)


class InvalidFileError(LemixError):
    """A training file that cannot be learnt from; `error` is what its job says of it."""

    def __init__(self, error: JobError) -> None:
        super().__init__(error.message)
        self.error = error


class AbandonedError(LemixError):
    """Nobody waits for the file any more."""


@dataclass(frozen=True, slots=True)
class TrainingFile:
    """The examples of a file, in order."""

    lines: tuple[bytes, ...]
    """Each a JSON object."""
    num_tokens: tuple[int, ...]

    def batch_of(self, job: Job, step: int) -> tuple[bytes, int]:
        """The body of a step's batch, and its number of tokens."""
        places = examples_of(job, step)
        multiplier = job.hyperparameters.learning_rate_multiplier
        about = {"id": job.batch_id(step), "learning_rate_multiplier": multiplier, "producer": job.producer}
        beta = {} if job.beta is None else {"beta": job.beta}
        head = json.dumps(about | beta, ensure_ascii=False)
        examples = b",".join(self.lines[place] for place in places)
        body = head[:-1].encode() + b',"examples":[' + examples + b"]}"
        return body, sum(self.num_tokens[place] for place in places)

    def check_batches(self, batch_size: int, max_bytes: int) -> None:
        """Raises InvalidFileError when a batch could come to more than a message may hold.

        Whatever the order, no batch is larger than that of the longest lines.
        """
        longest = sorted((len(line) + 1 for line in self.lines), reverse=True)[:batch_size]
        if sum(longest) + ENVELOPE_BYTES > max_bytes:
            message = (
                f"The {len(longest)} longest lines have {sum(longest)} bytes together; a batch can hold "
                f"{max_bytes - ENVELOPE_BYTES}: choose a smaller batch_size, or shorter examples"
            )
            raise InvalidFileError(JobError(code="batch_too_large", message=message, param="training_file"))


def examples_of(job: Job, step: int) -> tuple[int, ...]:
    """Places of the step's examples in the file."""
    epoch, number = divmod(step - 1, job.steps_per_epoch)
    start = number * job.hyperparameters.batch_size
    return _order(job.num_examples, job.seed, epoch)[start : start + job.hyperparameters.batch_size]


@lru_cache(maxsize=4)
def _order(num_examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of an epoch. It is the same after a restart, so that a step has the same examples."""
    places = list(range(num_examples))
    random.Random(f"{seed}-{epoch}").shuffle(places)
    return tuple(places)


def read_training_file(
    content: bytes, encoder: ExampleEncoder, *, of_preferences: bool, is_wanted: Callable[[], bool]
) -> TrainingFile:
    """Check and tokenise every line; blocks meanwhile, for a thread beside the event loop.

    `of_preferences`: every line must hold one; else none may.

    Raises InvalidFileError naming the first wrong lines, each with its reason, and AbandonedError once the
    file is no longer wanted.
    """
    lines: list[bytes] = []
    num_tokens: list[int] = []
    faults: list[str] = []
    for number, line in numbered_lines(content):
        if not is_wanted():
            raise AbandonedError("the file is no longer wanted")
        time.sleep(0)  # lets the event loop have the interpreter at once: it has tokens to stream
        try:
            example = read_example(line)
            _check_kind(example, of_preferences=of_preferences)
            num_tokens.append(_num_tokens(example, encoder))
            lines.append(line)
        except InvalidBatchError as error:
            faults.append(f"line {number}: {str(error)[:MAX_FAULT_CHARACTERS]}")
    if faults:
        raise InvalidFileError(_refusal(faults))
    if not lines:
        raise InvalidFileError(_refusal(["the file holds no example"]))
    return TrainingFile(tuple(lines), tuple(num_tokens))


def _check_kind(example: AnyExample, *, of_preferences: bool) -> None:
    """Raises InvalidBatchError."""
    if isinstance(example, Preference) and not of_preferences:
        raise InvalidBatchError("is a preference, which a supervised job cannot learn: choose method dpo")
    if of_preferences and not isinstance(example, Preference):
        raise InvalidBatchError(
            "is no preference (input, preferred_output, non_preferred_output), as dpo needs"
        )


def _num_tokens(example: AnyExample, encoder: ExampleEncoder) -> int:
    try:
        return sum(len(each.tokens) for each in encoder.sequences(example))
    except InvalidBatchError:
        raise
    except Exception as error:  # a tokenizer or template may raise anything
        log.exception("a training example cannot be encoded")
        raise InvalidBatchError(f"{type(error).__name__}: {error}") from error


def _refusal(faults: Sequence[str]) -> JobError:
    more = len(faults) - MAX_FAULTS_SHOWN
    shown = "; ".join(faults[:MAX_FAULTS_SHOWN]) + (f"; and {more} more" if more > 0 else "")
    return JobError(
        code="invalid_training_file", message=f"The training file is wrong: {shown}", param="training_file"
    )
