"""One run of the learning study: the embedded model learns and serves bulletins, in virtual time."""

import gc
from random import Random

from lemix.simulation.computing import embedded_model
from lemix.simulation.run import measured, planned, simulated
from lemix.studies.grid import Cell
from lemix.studies.learning_metrics import loss_metrics
from lemix.studies.learning_texts import bulletins, with_texts
from lemix.studies.rows import Metrics
from lemix.studies.runs import as_numbers


def run_learning(cell: Cell) -> Metrics:
    """The metrics of a simulated run, and what it learnt."""
    seed = cell.cluster.seed
    workload = with_texts(planned(cell.workload, seed), bulletins(), Random(f"texts {seed}"))
    record = simulated(cell.cluster, workload, embedded_model())
    gc.unfreeze()  # stages freeze all that they load, as if their process ended with them
    gc.collect()
    metrics = measured(record, cell.cluster)
    return {**as_numbers(metrics, cell.workload), **loss_metrics(record.requests)}
