"""Bytes that a weight takes where it is trained and served at once. Pure."""

MASTER_BYTES = 4
"""The float32 copy that learns, where the weights have 16 bits."""
LEARNING_BYTES = 12
"""AdamW's moments and a batch's gradient, in float32 (docs/training.md)."""
NUM_KEPT_VERSIONS = 2
"""Under a guard: one that serves, and one that is judged."""
_NUM_COPIES = 3 + NUM_KEPT_VERSIONS
"""A microbatch's gradient, the copy that forwards use, the reference of preferences, and kept versions."""
_NUM_CPU_COPIES = 4
"""Packed for several rows and transposed for one, of the version that serves and of the next."""


def bytes_beside(itemsize: int) -> int:
    """Bytes that learning takes beside the weight and its master; `itemsize`: bytes of the weight."""
    return LEARNING_BYTES + _NUM_COPIES * itemsize


def bytes_in_all(itemsize: int, *, on_cpu: bool) -> int:
    """Everything, at most: a model of 135 million weights in float32 took 56 a weight on a CPU."""
    masters = 0 if itemsize == MASTER_BYTES else MASTER_BYTES
    copies = _NUM_CPU_COPIES * itemsize if on_cpu else 0
    return itemsize + masters + bytes_beside(itemsize) + copies
