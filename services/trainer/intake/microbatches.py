"""A batch cut into microbatches: flat rows, as stages take them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from shared.encoding import LabelledTokens
from shared.messages.lineage import ExampleSource, LearntBatch


@dataclass(frozen=True, slots=True)
class Rows:
    """The sequences of one microbatch, one after the other; a preference has two, the preferred one first."""

    lengths: tuple[int, ...]
    """Tokens of each sequence."""
    tokens: tuple[int, ...]
    label_rows: tuple[int, ...]
    """Rows of `tokens` whose next token counts in the loss."""
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """One optimizer step, ready to be fed."""

    batch_id: str
    sequence: int
    """Where it stands in the training stream."""
    microbatches: tuple[Rows, ...]
    body: bytes
    """The batch as it was published, should it be rejected."""
    sha256: str
    """Digest of the body, in hex."""
    learning_rate_multiplier: float = 1.0
    beta: float | None = None
    """For preferences; None: there are none in it."""
    producer: str = ""
    """Who has published it, as it says; empty: not told."""
    sources: tuple[ExampleSource, ...] = ()
    """Where the examples come from that train, as the batch says; empty: not told."""
    held_out: tuple[int, ...] = ()
    """Positions of the examples that do not, where it says so."""

    def as_learnt(self) -> LearntBatch:
        """The batch as the lineage of weights tells of it."""
        return LearntBatch(
            id=self.batch_id,
            sequence=self.sequence,
            producer=self.producer,
            sha256=self.sha256,
            sources=self.sources,
        )

    @property
    def loss_weight(self) -> float:
        """Makes the sum of the losses their mean: of all labels, or of all preferences."""
        if self.beta is not None:
            return 2.0 / sum(len(rows.lengths) for rows in self.microbatches)
        return 1.0 / sum(len(rows.labels) for rows in self.microbatches)

    @property
    def num_tokens(self) -> int:
        return sum(len(rows.tokens) for rows in self.microbatches)


@dataclass(frozen=True, slots=True)
class HeldOutBatch:
    """A batch without an example to train on: all are held out."""

    batch_id: str


def split(lengths: Sequence[int], num_groups: int, max_tokens: int) -> list[range]:
    """Cut examples, in order, into about `num_groups` groups of about equal tokens.

    No group is empty or above `max_tokens` (which no example exceeds): there are fewer groups than
    asked for only when there are fewer examples, and more only when they would be too large.
    """
    groups: list[range] = []
    start, tokens_left = 0, sum(lengths)
    while start < len(lengths):
        groups_left = max(1, num_groups - len(groups))
        end = _end_of_group(lengths, start, tokens_left / groups_left, max_tokens, groups_left)
        groups.append(range(start, end))
        tokens_left -= sum(lengths[start:end])
        start = end
    return groups


def _end_of_group(
    lengths: Sequence[int], start: int, wanted_tokens: float, max_tokens: int, groups_left: int
) -> int:
    """Take examples while that brings the group nearer to what is wanted; leave one for each later group."""
    size, end = lengths[start], start + 1
    while end < len(lengths) and len(lengths) - end >= groups_left:
        larger = size + lengths[end]
        if larger > max_tokens or larger - wanted_tokens > wanted_tokens - size:
            break
        size, end = larger, end + 1
    return end


def cut(examples: Sequence[tuple[LabelledTokens, ...]], num_groups: int, max_tokens: int) -> tuple[Rows, ...]:
    """Cut a batch into microbatches, as `split` does; the sequences of an example stay together."""
    lengths = [sum(len(each.tokens) for each in sequences) for sequences in examples]
    groups = split(lengths, num_groups, max_tokens)
    return tuple(join([*chain(*examples[group.start : group.stop])]) for group in groups)


def join(examples: Sequence[LabelledTokens]) -> Rows:
    """Put sequences one after the other."""
    starts: list[int] = []
    tokens: list[int] = []
    for example in examples:
        starts.append(len(tokens))
        tokens.extend(example.tokens)
    return Rows(
        lengths=tuple(len(example.tokens) for example in examples),
        tokens=tuple(tokens),
        label_rows=tuple(
            start + row for start, example in zip(starts, examples, strict=True) for row in example.label_rows
        ),
        labels=tuple(label for example in examples for label in example.labels),
    )
