"""Common parts of studies: model classes, contenders, sizes, and the cell that a choice of them gives.
these.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lemix.simulation.cluster import SimulationOptions
from lemix.simulation.workload import WorkloadOptions
from lemix.studies.grid import Cell
from lemix.studies.rows import BOUND, POLICY, Labels
from lemix.studies.verdicts import PAPERS_SEPARATE

NUM_TASKS = 334
"""The paper's, of Llama; of its 1,000 GPT sequences in batches of three it makes as many tasks."""
QUICK_TASKS = 60
SEEDS = range(5)
QUICK_SEEDS = range(1)
NODES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelClass:
    """A model on its devices, as the paper's class of the same size."""

    name: str
    device: str
    batch_size: int
    """Sequences of a training task; a request is one sequence."""

    @property
    def profile(self) -> str:
        return f"{self.name}@{self.device}"


GPT_CLASSES = tuple(
    ModelClass(name=f"gpt2-{size}", device="rtx6000ada", batch_size=3)
    for size in ("small", "medium", "large")
)
LLAMA_CLASSES = (
    ModelClass(name="llama2-7b", device="a100", batch_size=1),
    ModelClass(name="llama2-13b", device="a100", batch_size=1),
    # Eight A100s hold the 70B weights and AdamW states, and hardly anything else.
    ModelClass(name="llama2-70b", device="h200", batch_size=1),
)
CLASSES = {model.name: model for model in (*GPT_CLASSES, *LLAMA_CLASSES)}


@dataclass(frozen=True, slots=True)
class Contender:
    """A policy under the name that tables give it."""

    label: str
    policy: str = ""
    """The policy as the scheduler reads it; `{split}` is the paper's share of nodes. Empty: the label."""
    discipline: str = "slo_first"

    def policy_at(self, training_rate: float, nodes: int) -> str:
        return (self.policy or self.label).format(split=papers_split(training_rate, nodes))


def papers_split(training_rate: float, nodes: int) -> float:
    """Share of the nodes that train: as near to the training rate as whole nodes allow, at least one each."""
    return min(max(1, round(nodes * training_rate)), nodes - 1) / nodes


AS_IN_THE_PAPER = Contender(PAPERS_SEPARATE, "separate:split={split}")
LIMIT = Contender(BOUND)
"""No policy: what none can exceed."""
RIVALS = (
    Contender("lemix"),
    Contender("round_robin"),
    Contender("least_loaded"),
    AS_IN_THE_PAPER,
    Contender("separate:split=0.25"),
    Contender("separate:split=0.5"),
    Contender("separate:split=0.75"),
)
"""LeMix, and each baseline in every configuration that may be its best."""
OTHERS = (
    Contender("lemix_released"),
    Contender("round_robin (fifo)", "round_robin", "fifo"),
    Contender("random"),
    Contender("separate:split=dynamic"),
)
CONTENDERS = (*RIVALS, *OTHERS)
"""All but the released stages' own order (fifo) let inference overtake training on a stage: strong
baselines.
"""
ESSENTIAL = (RIVALS[0], RIVALS[1], AS_IN_THE_PAPER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The load on the cluster."""

    rate_per_s: float
    training_rate: float
    num_tasks: int = NUM_TASKS


def cell(
    model: ModelClass,
    contender: Contender,
    load: Load,
    *,
    seed: int,
    labels: Labels,
    cluster: Mapping[str, Any] | None = None,
    workload: Mapping[str, Any] | None = None,
) -> Cell:
    """One run; `cluster` and `workload` override the options that follow from the rest."""
    nodes = (cluster or {}).get("nodes", NODES)
    cluster_options: dict[str, Any] = {
        "nodes": nodes,
        "profile": model.profile,
        "policy": contender.policy_at(load.training_rate, nodes),
        "discipline": contender.discipline,
        "seed": seed,
        "trainer_settings": {"microbatches": 1},
    }
    workload_options: dict[str, Any] = {
        "num_tasks": load.num_tasks,
        "training_rate": load.training_rate,
        "rate_per_s": load.rate_per_s,
        "batch_size": model.batch_size,
    }
    return Cell(
        labels={**labels, POLICY: contender.label},
        cluster=SimulationOptions(**cluster_options | dict(cluster or {})),
        workload=WorkloadOptions(**workload_options | dict(workload or {})),
    )


def num_tasks(quick: bool) -> int:
    return QUICK_TASKS if quick else NUM_TASKS


def seeds(quick: bool) -> Sequence[int]:
    return QUICK_SEEDS if quick else SEEDS
