"""The price of publishing weights versions for running requests: time between tokens, under training.

Four clusters of one node serve and train the embedded model, in turns, with the same load: `withheld` serves
its first version for ever (a guard whose evaluation never comes), `pinned` publishes every version, and
`latest` takes each stage's newest weights from one iteration to the next. `guarded` publishes every eighth
version, once it has scored the model's own samples.
"""

import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from benchmarks.loaded_cluster import LoadedCluster, added_at_p99, examples, measure_in_turns

NUM_ROUNDS = 10
NEVER = str(1 << 30)


def held_out_file(work: Path) -> Path:
    work.mkdir(parents=True, exist_ok=True)
    path = work / "held_out.jsonl"
    path.write_text("\n".join(map(json.dumps, examples(-1))))
    return path


async def main(work: Path) -> dict[str, Any]:
    kinds: dict[str, dict[str, str]] = {
        "withheld": {"LEMIX_EVALUATE_EVERY": NEVER, "LEMIX_HELD_OUT": str(held_out_file(work).absolute())},
        "pinned": {"LEMIX_WEIGHTS_CONSISTENCY": "pinned"},
        "latest": {},
        "guarded": {"LEMIX_GUARD_SAMPLES": "16", "LEMIX_EVALUATE_EVERY": "8"},
    }
    async with AsyncExitStack() as stack:
        clusters = {
            kind: await LoadedCluster.start(f"publish-{kind}", work, stack, settings)
            for kind, settings in kinds.items()
        }
        results = await measure_in_turns(clusters, NUM_ROUNDS)
    added = {kind: added_at_p99(results, kind, to="withheld") for kind in ("pinned", "latest", "guarded")}
    return {**results, "added_at_p99_in_median_tbt": added}
