"""The durable streams that the trainer reads and writes."""

from shared.bus.base import StreamSpec
from shared.subjects import BATCHES, REJECTED

TRAIN_STREAM = StreamSpec("LEMIX_TRAIN", (BATCHES,))
REJECTED_STREAM = StreamSpec("LEMIX_REJECTED", (REJECTED,), discard_old=True)
