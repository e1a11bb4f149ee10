"""Points of profiles that were written before a point said how many positions it reads. Pure."""

from typing import Any

FIELD = "num_context_tokens"


def completed(point: dict[str, Any]) -> dict[str, Any]:
    """The point with the positions that it reads, where it lacks them and they follow from its other numbers.

    Raises ValueError when they do not follow. A point whose other numbers are not right is left as it is.
    """
    sizes = [point.get(name, 0) for name in ("num_tokens", "num_pairs", "num_sequences")]
    if FIELD in point or not all(isinstance(size, int) and size > 0 for size in sizes):
        return point
    num_read = _num_read(*sizes)
    if num_read is None:
        raise ValueError(f"a point of {sizes} tokens, pairs and sequences lacks its {FIELD}: measure it anew")
    return {**point, FIELD: num_read}


def _num_read(num_tokens: int, num_pairs: int, num_sequences: int) -> int | None:
    """For what `lemix profile` measured then: equal whole sequences, pieces, decodes; these with a prompt.

    None: it is none of these.
    """
    length, num_longer = divmod(num_tokens, num_sequences)
    if num_pairs == num_sequences * _whole(length) + num_longer * (length + 1):
        return num_tokens  # no rows have fewer pairs, so none has anything before it
    if num_tokens == num_sequences:
        return num_pairs
    num_rows = num_tokens - num_sequences + 1
    num_earlier = num_pairs - _whole(num_rows)
    if num_sequences == 1:
        start, rest = divmod(num_earlier, num_rows)
        return start + num_rows if start > 0 and rest == 0 else None
    context, rest = divmod(num_earlier, num_sequences - 1)
    return num_rows + num_earlier if context > 0 and rest == 0 else None


def _whole(num_tokens: int) -> int:
    """Pairs of a whole sequence."""
    return num_tokens * (num_tokens + 1) // 2
