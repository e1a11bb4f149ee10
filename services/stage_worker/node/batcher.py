"""Forms iterations: decodes first, then pieces of prompts, under a token budget.

Any sequence that is not in flight may join the next iteration, so groups need no bookkeeping:
with S iterations in flight and each taking its share of the decodes, all S stages work.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from shared.messages.inference import InferenceTask, Sampling, SequenceChunk, SequenceStart

MAX_STARTING_BYTES = 256 * 1024
"""Most bytes of the sequences that begin in one iteration: far less than a message carries."""


@dataclass(slots=True, kw_only=True)
class Sequence:
    """A request on its node, waiting for KV cache or running in it."""

    task: InferenceTask
    deadline_s: float
    traceparent: str
    blocks: tuple[int, ...] = ()
    num_cached: int = 0
    """Rows of the sequence whose keys and values are in the cache, or on their way there."""
    generated: list[int] = field(default_factory=list)
    has_begun: bool = False
    """The last stage knows it."""
    version: int | None = None
    """Weights version that it runs with to its end; None: the one that is published."""
    in_flight: bool = False
    """Its next row depends on a token that is still being computed."""

    @property
    def is_decoding(self) -> bool:
        return self.num_cached >= len(self.task.prompt)


def form_iteration(
    sequences: Iterable[Sequence], *, num_decoding: int, num_in_flight: int, token_budget: int
) -> list[tuple[Sequence, int]]:
    """The sequences of the next iteration with their number of rows, in order.

    `sequences`: all that are not in flight, longest unserved first. `num_decoding`: decoding sequences of
    the node, in flight or not; an iteration takes at most its share of them, 1 / `num_in_flight`.
    """
    ready = list(sequences)
    share = max(1, -(-num_decoding // num_in_flight))
    decodes = [sequence for sequence in ready if sequence.is_decoding][: min(share, token_budget)]
    rows = [(sequence, 1) for sequence in decodes]
    budget, starting_bytes = token_budget - len(rows), 0
    for sequence in ready:
        if sequence.is_decoding or budget <= 0:
            continue
        size = 0 if sequence.has_begun else _size_bytes(sequence.task.sampling)
        if starting_bytes and starting_bytes + size > MAX_STARTING_BYTES:
            continue
        starting_bytes += size
        num_tokens = min(len(sequence.task.prompt) - sequence.num_cached, budget)
        rows.append((sequence, num_tokens))
        budget -= num_tokens
    return rows


def _size_bytes(sampling: Sampling) -> int:
    """About the bytes that its variable part takes in a message."""
    grammar = sampling.grammar or ""
    return len(grammar.encode()) + 16 * len(sampling.logit_bias) + 8 * len(sampling.stop_token_ids)


def form_scoring(sequences: Iterable[Sequence], *, token_budget: int) -> list[tuple[Sequence, int]]:
    """Whole prompts of one weights version, the first one whatever its length, with their number of rows."""
    rows: list[tuple[Sequence, int]] = []
    for sequence in sequences:
        num_tokens = len(sequence.task.prompt)
        if rows and (num_tokens > token_budget or sequence.version != rows[0][0].version):
            break
        rows.append((sequence, num_tokens))
        token_budget -= num_tokens
    return rows


def chunk_of(sequence: Sequence, num_tokens: int, *, block_size: int) -> SequenceChunk:
    """The next `num_tokens` rows of a sequence, as every stage needs them."""
    task, start = sequence.task, sequence.num_cached
    end = start + num_tokens
    is_prompt = not sequence.is_decoding
    start_of = SequenceStart(gateway=task.gateway, sampling=task.sampling)
    return SequenceChunk(
        task_id=task.task_id,
        begins=None if sequence.has_begun else start_of,
        start=start,
        num_tokens=num_tokens,
        blocks=sequence.blocks[: -(-end // block_size)],
        produces=end >= len(task.prompt),
        index=len(sequence.generated),
        targets=task.prompt[start + 1 : end + 1] if is_prompt and task.prompt_logprobs else (),
        tokens=task.prompt[start:end] if is_prompt and task.sampling.reads_prompt else (),
        traceparent=sequence.traceparent if is_prompt else "",
    )


def tokens_of(sequence: Sequence, num_tokens: int) -> tuple[int, ...]:
    """Token ids of the next `num_tokens` rows."""
    if sequence.is_decoding:
        return (sequence.generated[-1],)
    return sequence.task.prompt[sequence.num_cached : sequence.num_cached + num_tokens]
