"""Which way to attend to the cache, by the device and by what is installed."""

from services.stage_worker.compute.attention.decode import Decoder
from services.stage_worker.compute.attention.gathered import GatheredDecoder
from services.stage_worker.compute.attention.windows import WindowedDecoder
from services.stage_worker.compute.kv_cache import PagedKVCache


def decoder_for(cache: PagedKVCache, num_stages: int) -> Decoder:
    """The fastest way there is; `num_stages` iterations take turns."""
    if cache.device == "cpu":
        return WindowedDecoder(cache, num_stages)
    return GatheredDecoder(cache)
