"""One run of a study, as numbers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import partial

from lemix.simulation.cluster import SimulationOptions, devices_of
from lemix.simulation.metrics import RunMetrics
from lemix.simulation.run import objective_s, planned, simulate, slo_s
from lemix.simulation.workload import Workload, WorkloadOptions
from lemix.studies import bounds
from lemix.studies.bounds import Pipelines, Request
from lemix.studies.grid import Cell
from lemix.studies.rows import BOUND, Metrics
from lemix.studies.verdicts import APPLIED, GOODPUT, IN_TIME, SLO, THROUGHPUT, TRAINING
from lemix.studies.while_serving import IN_TIME_PER_S, UNDER_WAY, while_serving
from shared.schedule import is_synchronous
from shared.settings import MAX_ITERATION_TOKENS


def run_cell(cell: Cell) -> Metrics:
    """Simulate it; the cells of the policy `bound` are what no policy can exceed."""
    if cell.policy == BOUND:
        return bound_metrics(cell)
    record, metrics = simulate(cell.cluster, cell.workload)
    return {**as_numbers(metrics, cell.workload), **while_serving(record, metrics)}


def as_numbers(metrics: RunMetrics, workload: WorkloadOptions) -> Metrics:
    """Flat, with the applied batches as a share of all that were to come, not only of those that came."""
    numbers = dict(_numbers(metrics))
    share = numbers[APPLIED]
    if share is not None:
        numbers[APPLIED] = share * metrics.num_batches / workload.num_batches
    return numbers


def _numbers(metrics: RunMetrics) -> Iterator[tuple[str, float | None]]:
    for each in fields(metrics):
        value = getattr(metrics, each.name)
        if isinstance(value, tuple):
            yield from ((f"{each.name}_{index}", part) for index, part in enumerate(value))
        else:
            yield each.name, value


def bound_metrics(cell: Cell) -> Metrics:
    """Bounds under the names of the metrics they bound; times are bounded from below, all else from above."""
    workload = planned(cell.workload, cell.cluster.seed)
    pipelines, requests = pipelines_of(cell.cluster), _requests(cell, workload)
    batches = [each.lengths for each in workload.batches]
    slo = bounds.slo_clairvoyant(pipelines, requests)
    return {
        SLO: slo,
        "slo_attainment_alone": bounds.slo_alone(pipelines, requests),
        GOODPUT: slo * len(requests) / requests[-1].at_s,
        IN_TIME_PER_S: slo * len(requests) / requests[-1].at_s,
        THROUGHPUT: bounds.tasks_per_node_s(pipelines, requests, batches),
        f"{THROUGHPUT}{IN_TIME}": bounds.tasks_per_node_s_in_time(pipelines, requests, batches),
        TRAINING: bounds.training_tokens_per_s(pipelines, batches, _gate(cell, pipelines)),
        "ttft_mean_s": sum(bounds.response_s(pipelines, each) for each in requests) / len(requests),
        "tbt_mean_s": bounds.tbt_s(pipelines) if cell.workload.max_tokens[1] > 1 else None,
        "slo_s": slo_s(cell.cluster),
    }


def least_nodes(cell: Cell, *, in_time: float, kept: float) -> int:
    """No policy serves and trains those shares on fewer nodes: see `bounds.fewest_nodes`."""
    workload = planned(cell.workload, cell.cluster.seed)
    requests = _requests(cell, workload)
    early_s = (1 - UNDER_WAY) * workload.requests[-1].at_s
    return bounds.fewest_nodes(
        pipelines_of(cell.cluster),
        requests,
        [each.lengths for each in workload.batches if each.at_s <= early_s],
        in_time=in_time,
        kept=kept,
        window_s=max(request.at_s + request.objective_s for request in requests),
    )


def share_alone(cell: Cell) -> float:
    """Share of the requests that can be in time at all, each with a node to itself."""
    return bounds.slo_alone(
        pipelines_of(cell.cluster), _requests(cell, planned(cell.workload, cell.cluster.seed))
    )


def _requests(cell: Cell, workload: Workload) -> list[Request]:
    return [
        Request(each.at_s, each.lengths, objective_s(cell.cluster, max(each.lengths)))
        for each in workload.requests
    ]


def pipelines_of(cluster: SimulationOptions) -> Pipelines:
    """The nodes of a cluster as the bounds know them."""
    return Pipelines(
        nodes=cluster.nodes,
        times=devices_of(cluster).times,
        hop_s=cluster.hop_s,
        max_iteration_tokens=int(cluster.stage_settings.get("max_iteration_tokens", MAX_ITERATION_TOKENS)),
    )


def _gate(cell: Cell, pipelines: Pipelines) -> Callable[[Sequence[int]], float]:
    """The condition for the release of the next batch."""
    if cell.workload.release != "closed":
        return lambda lengths: 0.0
    return partial(
        bounds.applying_s if is_synchronous(cell.cluster.schedule) else bounds.passing_s, pipelines
    )
