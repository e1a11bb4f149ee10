"""Every study by its name."""

from collections.abc import Callable, Mapping

from lemix.studies import variations
from lemix.studies.frontier import frontier
from lemix.studies.generation import generation
from lemix.studies.grid import Study
from lemix.studies.learning import learning
from lemix.studies.live import live
from lemix.studies.main_grid import DATA_PARALLEL, MAIN, SYNCHRONOUS
from shared.errors import ConfigurationError

STUDIES: Mapping[str, Callable[..., Study]] = {
    "frontier": frontier,
    "main": MAIN.study,
    "heterogeneity": variations.heterogeneity,
    "ablation": variations.ablation,
    "sensitivity": variations.sensitivity,
    "synchronous": SYNCHRONOUS.study,
    "generation": generation,
    "data-parallel": DATA_PARALLEL.study,
    "learning": learning,
    "live": live,
}


def study_named(name: str, *, quick: bool) -> Study:
    """The study of that name. Raises ConfigurationError, naming the choices, when there is none."""
    if name not in STUDIES:
        raise ConfigurationError(f"study {name!r} is unknown; choose one of: {', '.join(STUDIES)}")
    return STUDIES[name](quick=quick)
