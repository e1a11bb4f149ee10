"""Write the sea-weather bulletins that LeMix trains on in its demonstration and studies.

    python tools/generate_bulletins.py lemix/data

The bulletins come from the small grammar below and a seed: every name in them is invented. They
have a phrasing that the embedded model has never seen, so a falling loss on the held-out bulletins
shows learning and nothing else.
"""

import json
from pathlib import Path
from random import Random

import typer

NUM_BATCHES = 200
NUM_EXAMPLES_IN_BATCH = 8
NUM_BATCHES_PER_PROMPTED_BATCH = 4
NUM_HELD_OUT = 24

FIRST_NAMES = (
    "Arn",
    "Bell",
    "Cold",
    "Dun",
    "East",
    "Fern",
    "Grey",
    "Hollow",
    "Iron",
    "Long",
    "North",
    "Stone",
)
LAST_NAMES = ("bank", "ford", "haven", "holm", "mere", "moor", "ness", "point", "reef", "sound", "wick")
DIRECTIONS = ("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest")
SEA_STATES = ("calm", "smooth", "slight", "moderate", "rough", "very rough", "high")
WEATHERS = (
    "drizzle",
    "low cloud",
    "fog patches",
    "heavy rain",
    "light snow",
    "passing showers",
    "sea mist",
)
VISIBILITIES = ("good", "moderate", "poor", "very poor")
TIMES_OF_DAY = ("dawn", "noon", "dusk", "midnight")
TRENDS = ("falling slowly", "falling quickly", "rising slowly", "rising quickly", "steady")
GALE_FORCE = 8


def wind(random: Random, force: int) -> str:
    before, after = random.sample(DIRECTIONS, 2)
    change = random.choice(("veering", "backing"))
    return f"Wind {before} force {force}, {change} {after} by {random.choice(TIMES_OF_DAY)}."


def sea(random: Random, force: int) -> str:
    """The stronger the wind, the rougher the sea and the higher the swell."""
    state = SEA_STATES[(force - 1) * len(SEA_STATES) // 10]
    swell_dm = 4 * force + random.randrange(10)
    return f"Sea {state}, swell {swell_dm / 10:.1f} metres."


def sky(random: Random) -> str:
    return f"Visibility {random.choice(VISIBILITIES)} in {random.choice(WEATHERS)}."


def pressure(random: Random) -> str:
    return f"Barometer {random.randrange(970, 1040)}, {random.choice(TRENDS)}."


def advice(random: Random, force: int) -> str:
    if force >= GALE_FORCE:
        return f"Gale warning: all vessels seek shelter before {random.choice(TIMES_OF_DAY)}."
    if force >= GALE_FORCE - 2:
        return "Small craft remain in harbour."
    return "No warnings in force."


def bulletin(random: Random) -> tuple[str, str]:
    """(heading, report); a bulletin is the heading followed by the report."""
    force = random.randint(1, 10)
    hour, minute = random.randrange(24), random.choice((0, 20, 40))
    area = random.choice(FIRST_NAMES) + random.choice(LAST_NAMES)
    heading = f"Sea area {area}, issued at {hour:02}:{minute:02}."
    parts = [wind(random, force), sea(random, force), sky(random), pressure(random), advice(random, force)]
    return heading, " " + " ".join(parts)


def training_batch(random: Random, number: int, excluded: set[str]) -> dict[str, object]:
    """Plain texts, and in every fourth batch the heading as prompt and the report as completion."""
    pairs: list[tuple[str, str]] = []
    while len(pairs) < NUM_EXAMPLES_IN_BATCH:
        heading, report = bulletin(random)
        if heading + report not in excluded:
            pairs.append((heading, report))
    if number % NUM_BATCHES_PER_PROMPTED_BATCH == 0:
        examples = [{"prompt": heading, "completion": report} for heading, report in pairs]
    else:
        examples = [{"text": heading + report} for heading, report in pairs]
    return {"id": f"bulletins-{number:04}", "examples": examples}


def main(folder: Path, training_seed: int = 1, held_out_seed: int = 2) -> None:
    """Write bulletins_train.jsonl and bulletins_heldout.txt into the folder."""
    random = Random(held_out_seed)
    held_out = ["".join(bulletin(random)) for _ in range(NUM_HELD_OUT)]
    random = Random(training_seed)
    batches = [training_batch(random, number, set(held_out)) for number in range(1, NUM_BATCHES + 1)]
    lines = [json.dumps(batch) for batch in batches]
    (folder / "bulletins_train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "bulletins_heldout.txt").write_text("\n".join(held_out) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
