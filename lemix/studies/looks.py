"""The look of each policy in every figure: one colour and one mark, everywhere the same. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lemix.studies.rows import BOUND
from lemix.studies.verdicts import LEMIX, PAPERS_SEPARATE, SEPARATE

PAPER = "paper: "
"""Beginning of the names of what the paper says; the rest is the policy, whose look it shares."""
SIMULATED = " (simulated)"
"""End of the names of simulations beside the real cluster."""


@dataclass(frozen=True, slots=True)
class Look:
    colour: str
    marker: str
    dashes: str = "-"


KNOWN: Mapping[str, Look] = {
    LEMIX: Look("#1f77b4", "o"),
    "round_robin": Look("#ff7f0e", "s"),
    "round_robin (fifo)": Look("#b35900", "s", ":"),
    "least_loaded": Look("#2ca02c", "^"),
    SEPARATE: Look("#d62728", "D"),
    PAPERS_SEPARATE: Look("#d62728", "D"),
    "separate:split=0.25": Look("#e377c2", "v"),
    "separate:split=0.5": Look("#9467bd", "<"),
    "separate:split=0.75": Look("#8c564b", ">"),
    "separate:split=dynamic": Look("#f7b6d2", "P"),
    "lemix_released": Look("#7f7f7f", "x"),
    "random": Look("#bcbd22", "*"),
    BOUND: Look("#000000", "_", "--"),
}
OTHERS = (
    *("#17becf", "#aec7e8", "#ffbb78", "#98df8a", "#c5b0d5", "#c49c94", "#dbdb8d", "#9edae5"),
    *("#393b79", "#637939", "#8c6d31", "#843c39"),
)
"""Colours of names that are no policy: parts, weights."""


def looks_of(names: Iterable[str]) -> dict[str, Look]:
    """By name; what the paper or a simulation says of a policy is dashed."""
    distinct = list(dict.fromkeys(names))
    unknown = [name for name in distinct if _policy(name) not in KNOWN]
    found = {name: Look(OTHERS[place % len(OTHERS)], "o") for place, name in enumerate(unknown)}
    for name in distinct:
        if name not in found:
            known = KNOWN[_policy(name)]
            found[name] = known if name in KNOWN else Look(known.colour, known.marker, "--")
    return found


def _policy(name: str) -> str:
    return name.removeprefix(PAPER).removesuffix(SIMULATED)
