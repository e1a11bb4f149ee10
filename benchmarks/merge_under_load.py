"""The price of merges for running requests: time between tokens, under training.

Three clusters of two nodes serve and train the embedded model, in turns, with the same load: nodes that stay
`apart`, and nodes whose weights become one every four batches of each (`average`) or at every step
(`allreduce`).
"""

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from benchmarks.loaded_cluster import LoadedCluster, added_at_p99, measure_in_turns

NUM_ROUNDS = 10
KINDS: dict[str, dict[str, str]] = {
    "apart": {},
    "average": {"LEMIX_MERGE": "average", "LEMIX_MERGE_EVERY": "4"},
    "allreduce": {"LEMIX_MERGE": "allreduce"},
}


async def main(work: Path) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        clusters = {
            kind: await LoadedCluster.start(f"merge-{kind}", work, stack, settings, nodes=2)
            for kind, settings in KINDS.items()
        }
        results = await measure_in_turns(clusters, NUM_ROUNDS)
    added = {kind: added_at_p99(results, kind, to="apart") for kind in ("average", "allreduce")}
    return {**results, "added_at_p99_in_median_tbt": added}
