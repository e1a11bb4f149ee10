"""How large a piece of work is: what its time follows from."""

from collections.abc import Sequence
from functools import reduce
from operator import add

from services.stage_worker.compute.executor import SequenceChunk
from shared.messages.training import Microbatch
from shared.profiles.times import Work, work_of_rows


def work_of_iteration(chunks: Sequence[SequenceChunk]) -> Work:
    """The size of an inference iteration."""
    return reduce(add, (work_of_rows(chunk.start, chunk.num_tokens) for chunk in chunks))


def work_of_microbatch(microbatch: Microbatch) -> Work:
    """The size of a microbatch's forward, and of its backward."""
    return reduce(add, (work_of_rows(0, length) for length in microbatch.lengths))
