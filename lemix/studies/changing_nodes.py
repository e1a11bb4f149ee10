"""Nodes that are not alike, and nodes that fail, come back or slow down while requests arrive."""

from collections.abc import Mapping, Sequence
from typing import Any

from lemix.simulation.node_events import NodeEvent
from lemix.studies.demand import DEVICES, SEEDS, Demand
from lemix.studies.grid import Report, Study
from lemix.studies.measures import (
    IN_TIME_RATE,
    NOT_ANSWERED,
    SLO_ATTAINMENT,
    TRAINING_APPLIED,
    TRAINING_KEPT,
    TTFT_P99,
)
from lemix.studies.rows import Row, points
from lemix.studies.runs import run_cell
from lemix.studies.setting import CLASSES, NODES
from lemix.studies.tables import sections_by
from lemix.studies.verdicts import LEMIX, all_applied, slo_near_best

RATE_PER_S = 85
TRAINING_TOKENS_PER_S = 1_720
NUM_REQUESTS = 850
"""They come within 10 s."""
POLICIES = (LEMIX, "least_loaded", "round_robin", "separate:split=0.25", "separate:split=0.5")
MEASURES = (SLO_ATTAINMENT, IN_TIME_RATE, TTFT_P99, NOT_ANSWERED, TRAINING_KEPT, TRAINING_APPLIED)
FAST = "llama2-13b@h200"

Cases = Mapping[str, Mapping[str, Any]]
"""Options of the cluster by the name of the case."""

UNLIKE: Cases = {
    "alike": {},
    "one 3 times slower, untold": {"events": (NodeEvent(at_s=0, kind="slow", node=3, factor=3),)},
    "two on H200": {"node_profiles": {2: FAST, 3: FAST}},
    "one on H200": {"node_profiles": {3: FAST}},
}


def failing(at_s: float, back_s: float) -> Cases:
    """One node fails or leaves, and joins again; or one slows down."""
    back = NodeEvent(at_s=back_s, kind="join", node=1)
    return {
        "nothing": {},
        "one fails and comes back": {"events": (NodeEvent(at_s=at_s, kind="fail", node=1), back)},
        "one leaves and comes back": {"events": (NodeEvent(at_s=at_s, kind="leave", node=1), back)},
        "one becomes 3 times slower": {"events": (NodeEvent(at_s=at_s, kind="slow", node=1, factor=3),)},
    }


AT_S = (2.0, 5.0)
"""When something happens to a node, and when it is back."""
QUICK_AT_S = (0.2, 0.4)
LOAD = f"""\
llama2-13b on four nodes of A100s with noise and a table of their own, {RATE_PER_S} requests per second for
10 s and {TRAINING_TOKENS_PER_S} training tokens per second."""
ABOUT_UNLIKE = f"""\
{LOAD} `untold`: the profile knows nothing of it, and the scheduler has to see it."""
ABOUT_FAILURES = f"""\
{LOAD} After {AT_S[0]:g} s something happens to one node, and nobody is told before: it fails without a word,
or leaves and says so, and is back {AT_S[1]:g} s after the beginning; or its ops take three times as long."""


def unlike(*, quick: bool) -> Study:
    return _study("unlike", "Nodes that are not alike", ABOUT_UNLIKE, UNLIKE, quick)


def failures(*, quick: bool) -> Study:
    cases = failing(*(QUICK_AT_S if quick else AT_S))
    return _study("failures", "Nodes that fail, leave and slow down", ABOUT_FAILURES, cases, quick)


def _study(name: str, title: str, about: str, cases: Cases, quick: bool) -> Study:
    model = CLASSES["llama2-13b"]
    cells = [
        cell
        for case, changes in list(cases.items())[: 2 if quick else None]
        for policy in POLICIES[: 2 if quick else None]
        for cell in Demand(
            profile=model.profile,
            rate_per_s=RATE_PER_S,
            training_tokens_per_s=TRAINING_TOKENS_PER_S,
            num_requests=50 if quick else NUM_REQUESTS,
            cluster={**DEVICES, **changes},
        ).runs(policy, NODES, SEEDS[:1] if quick else SEEDS, {"class": model.name, "case": case})
    ]
    return Study(name=name, title=title, about=about, cells=cells, run=run_cell, report=report)


def report(rows: Sequence[Row]) -> Report:
    at = points(rows)
    return Report(sections=sections_by(rows, "case", MEASURES), verdicts=[slo_near_best(at), all_applied(at)])
