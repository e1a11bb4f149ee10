"""Every study by its name."""

from collections.abc import Callable, Mapping
from pathlib import Path

from lemix.studies import changing_nodes, variations
from lemix.studies.busy_parts import busy_parts
from lemix.studies.frontier import frontier
from lemix.studies.generation import generation
from lemix.studies.grid import Study
from lemix.studies.learning import learning
from lemix.studies.live import live
from lemix.studies.main_grid import DATA_PARALLEL, MAIN, SYNCHRONOUS
from lemix.studies.overload import overload
from lemix.studies.real_trace import real_trace
from shared.errors import ConfigurationError

STUDIES: Mapping[str, Callable[..., Study]] = {
    "frontier": frontier,
    "overload": overload,
    "unlike": changing_nodes.unlike,
    "failures": changing_nodes.failures,
    "main": MAIN.study,
    "heterogeneity": variations.heterogeneity,
    "ablation": variations.ablation,
    "busy-parts": busy_parts,
    "sensitivity": variations.sensitivity,
    "synchronous": SYNCHRONOUS.study,
    "generation": generation,
    "data-parallel": DATA_PARALLEL.study,
    "learning": learning,
    "live": live,
}


TRACE = "trace"
"""The study of recorded requests, which are a file of the person's."""


def study_named(name: str, *, quick: bool, trace: Path | None = None) -> Study:
    """The study of that name.

    Raises ConfigurationError, naming the choices, when there is none, and when a trace is missing, wrong, or
    of no use to it.
    """
    if name == TRACE and trace is not None:
        return real_trace(trace, quick=quick)
    if name == TRACE:
        raise ConfigurationError(
            "study trace needs --trace FILE: CSV with timestamp, prompt and output tokens"
        )
    if name not in STUDIES:
        raise ConfigurationError(f"study {name!r} is unknown; choose one of: {', '.join((*STUDIES, TRACE))}")
    if trace is not None:
        raise ConfigurationError(f"study {name} draws its requests: --trace {str(trace)!r} would do nothing")
    return STUDIES[name](quick=quick)
