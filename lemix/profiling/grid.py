"""Which ops `lemix profile` measures: prompts, pieces of them, decoding, these at once, and microbatches."""

from dataclasses import dataclass

MAX_ROWS = 2048
"""Rows of one op: as many as a microbatch may have by default."""

LATE_PIECES = tuple((start, num_tokens) for start in (512, 1536, 3584) for num_tokens in (64, 512))
"""(start, rows) of long prompts' pieces, each measured alone and beside decoding: only these have many more
positions to read than rows, and many more pairs than positions to read."""

BLOCK_SLACK = 64
"""Tokens that a sequence's last block may leave unused at most."""


@dataclass(frozen=True, slots=True)
class IterationShape:
    """An inference iteration: for each sequence where its rows start, and how many they are."""

    chunks: tuple[tuple[int, int], ...]

    @property
    def num_tokens(self) -> int:
        return sum(num_tokens for _, num_tokens in self.chunks)

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values it needs room for."""
        return sum(start + num_tokens for start, num_tokens in self.chunks)


@dataclass(frozen=True, slots=True)
class Grid:
    """The points that are measured, each for some repeats."""

    iterations: tuple[IterationShape, ...]
    microbatches: tuple[tuple[int, ...], ...]
    """Tokens of each example."""
    num_repeats: int

    @property
    def kv_tokens(self) -> int:
        """Room for the largest iteration, each sequence in blocks of its own."""
        return max(shape.num_cached + BLOCK_SLACK * len(shape.chunks) for shape in self.iterations)


def grid_for(context_length: int, *, is_quick: bool) -> Grid:
    """The points that fit a context; a quick grid is for trying the command."""
    lengths = (1, 8, 64) if is_quick else (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
    batch_sizes = (4,) if is_quick else (2, 4, 8, 16, 32)
    contexts = (32,) if is_quick else (16, 128, 512)
    pieces = ((96, 32),) if is_quick else LATE_PIECES
    iterations = (
        *(prefill(0, length) for length in lengths),
        *(prefill(context, length) for context in contexts for length in lengths[2::4]),
        *(decoding(size, context) for size in batch_sizes for context in contexts),
        *(mixed(size, contexts[-1], 0, length) for size in batch_sizes[::2] for length in lengths[2::4]),
        *(prefill(*piece) for piece in pieces),
        *(mixed(batch_sizes[-1] // 4, contexts[-1], *piece) for piece in pieces),
    )
    microbatches = (
        *((length,) for length in lengths if length > 1),
        *((length,) * size for size in batch_sizes[::2] for length in lengths[2::3]),
    )
    return Grid(
        iterations=tuple(shape for shape in iterations if _fits(shape, context_length)),
        microbatches=tuple(
            lengths for lengths in microbatches if max(lengths) <= context_length and sum(lengths) <= MAX_ROWS
        ),
        num_repeats=3 if is_quick else 7,
    )


def prefill(start: int, num_tokens: int) -> IterationShape:
    """A prompt's rows, from `start` on."""
    return IterationShape(((start, num_tokens),))


def decoding(num_sequences: int, context: int) -> IterationShape:
    """One row of each sequence; each has `context` tokens before it."""
    return IterationShape(((context, 1),) * num_sequences)


def mixed(num_sequences: int, context: int, start: int, num_tokens: int) -> IterationShape:
    """Decoding, and a prompt's rows from `start` on, in one iteration."""
    return IterationShape((*decoding(num_sequences, context).chunks, (start, num_tokens)))


def _fits(shape: IterationShape, context_length: int) -> bool:
    longest = max(start + num_tokens for start, num_tokens in shape.chunks)
    return longest <= context_length and shape.num_tokens <= MAX_ROWS
