"""Which way to attend to the cache, by the device and by what is installed."""

from services.stage_worker.compute.attention.decode import Decoder
from services.stage_worker.compute.attention.gathered import GatheredDecoder
from services.stage_worker.compute.attention.in_place import InPlaceDecoder
from services.stage_worker.compute.attention.kernels import PagedKernel
from services.stage_worker.compute.attention.windows import WindowedDecoder
from services.stage_worker.compute.kv_cache import PagedKVCache


def decoder_for(cache: PagedKVCache, num_stages: int, kernel: PagedKernel | None) -> Decoder:
    """The fastest way there is; `num_stages` iterations take turns. `kernel`: one for this cache, if any."""
    if kernel is not None:
        return InPlaceDecoder(cache, kernel)
    if cache.device == "cpu":
        return WindowedDecoder(cache, num_stages)
    return GatheredDecoder(cache)
