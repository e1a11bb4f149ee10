"""The durable streams that the trainer reads and writes."""

from shared import subjects
from shared.bus.base import StreamSpec

TRAIN_STREAM = StreamSpec(subjects.BATCHES_STREAM, (subjects.BATCHES,))
REJECTED_STREAM = StreamSpec(subjects.REJECTED_STREAM, (subjects.REJECTED,), discard_old=True)
