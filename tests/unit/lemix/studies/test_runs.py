from dataclasses import fields

from lemix.simulation.metrics import RunMetrics
from lemix.studies import measures, verdicts
from lemix.studies.measures import Measure
from lemix.studies.runs import bound_metrics
from tests.unit.lemix.studies.support import cell_of

METRICS = {field.name for field in fields(RunMetrics)}


def test_what_is_judged_and_shown_is_measured() -> None:
    judged = {verdicts.SLO, verdicts.THROUGHPUT, verdicts.GOODPUT, verdicts.TRAINING, verdicts.APPLIED}
    shown = {each.metric for each in vars(measures).values() if isinstance(each, Measure)}
    assert len(shown) > 5
    assert (judged | shown | set(verdicts.FORECAST_ERRORS)) - METRICS == {
        "in_time_per_s",
        "training_kept",
        "training_tokens_while_serving_per_s",
    }, "numbers of studies, of the time while requests arrive"


def test_bounds_have_the_names_of_what_they_bound() -> None:
    bound = dict(bound_metrics(cell_of("bound")))
    own = {"slo_attainment_alone", "tasks_per_node_s_in_time", "in_time_per_s"}
    assert bound.keys() - METRICS == own
    assert bound.pop("tbt_mean_s") is None, "nothing is generated"
    assert all(value is not None and value > 0 for value in bound.values())
