"""Forms iterations: decodes first, then pieces of prompts, under a token budget.

Any sequence that is not in flight may join the next iteration, so groups need no bookkeeping:
with S iterations in flight and each taking its share of the decodes, all S stages work.
"""

from collections.abc import Iterable
from itertools import islice

from services.stage_worker.node.sequence import Sequence
from shared.messages.inference import NewBlocks

MAX_STARTING_BYTES = 256 * 1024
"""Most bytes of the sequences that begin in one iteration: far less than a message carries."""

Rows = list[tuple[Sequence, int]]
"""The sequences of an iteration with their number of rows, in order."""


def form_iteration(
    decodes: Iterable[Sequence], prompts: Iterable[Sequence], *, most_decodes: int, token_budget: int
) -> Rows:
    """The rows of the next iteration. Looks at no more sequences than it takes, and one.

    `decodes` and `prompts`: sequences with their newest token to run, and with more; each longest unserved
    first. Beside decodes, prompts have no more rows together than each of them allows.
    """
    rows = [(sequence, 1) for sequence in islice(decodes, min(most_decodes, token_budget))]
    has_decodes, num_prompt_rows = bool(rows), 0
    budget, starting_bytes = token_budget - len(rows), 0
    for sequence in prompts:
        most_rows = sequence.task.pace.rows_beside_decodes
        if has_decodes and most_rows is not None:
            budget = min(budget, most_rows - num_prompt_rows)
        if budget <= 0:
            break
        size = 0 if sequence.has_begun else sequence.start_bytes
        if starting_bytes and starting_bytes + size > MAX_STARTING_BYTES:
            continue
        starting_bytes += size
        num_tokens = min(sequence.num_left, budget)
        rows.append((sequence, num_tokens))
        num_prompt_rows += num_tokens
        budget -= num_tokens
    return rows


def form_scoring(sequences: Iterable[Sequence], *, token_budget: int) -> Rows:
    """Whole prompts of one weights version, the first one whatever its length, with their number of rows."""
    rows: Rows = []
    for sequence in sequences:
        num_tokens = len(sequence.task.prompt)
        if rows and (num_tokens > token_budget or sequence.version != rows[0][0].version):
            break
        rows.append((sequence, num_tokens))
        token_budget -= num_tokens
    return rows


def new_blocks_of(rows: Rows) -> tuple[NewBlocks, ...]:
    """The blocks that the stages have not been told of."""
    return tuple(
        NewBlocks(place=place, first=known, blocks=tuple(sequence.held.blocks[known:]))
        for place, (sequence, _) in enumerate(rows)
        if (known := sequence.num_known_blocks) < len(sequence.held.blocks)
    )
