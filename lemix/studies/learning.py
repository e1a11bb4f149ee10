"""Inference loss while a model learns: over training rates, and over the time of a run, by policy."""

from collections.abc import Iterable, Mapping
from typing import Any

from lemix.studies import paper
from lemix.studies.grid import Cell, Study, grid
from lemix.studies.learning_report import MIDDLE, OF_THE_PAPER, PARALLELISM, TRAINING_RATE, report
from lemix.studies.rows import Label, Metrics
from lemix.studies.setting import AS_IN_THE_PAPER, CLASSES, Contender, Load, cell
from lemix.studies.verdicts import LEMIX

MODEL = CLASSES["gpt2-large"]
"""Whose time the devices take."""
NUM_TASKS = 120
QUICK_TASKS = 20
SEEDS = range(3)
TASKS_PER_S = 32
"""Requests and training batches together: a run of any training rate takes as long."""
LEARNING_RATE = 1e-4
CONTENDERS = (Contender(LEMIX), Contender("round_robin"), Contender("least_loaded"), AS_IN_THE_PAPER)
CLUSTERS: Mapping[str, Mapping[str, Any]] = {
    "S-PP": {"schedule": "1f1b", "nodes": 4},
    "DP": {"schedule": "1f1b", "nodes": 8, "stages": 1},
    "A-PP": {"schedule": "async", "nodes": 4},
}

ABOUT = f"""\
The embedded model learns and serves by the real services in virtual time: stage workers hold real weights,
train and answer with them, and their devices take the time of {MODEL.name} on {MODEL.device}. Inference loss
is the mean over the requests of the loss of the very weights that answered, at that time on that node, over
all tokens of the request's text but the first. Every text is a bulletin of the bundled training corpus (92
tokens on average, a kind of text that the model has not seen), drawn at random for a request or for a batch;
none comes twice. So requests and batches are of one kind, as in the paper, whose tasks are random rows of one
data set; nothing drifts.

- **S-PP**: four nodes of two stages, a flush after each batch. **DP**: eight nodes of one stage.
  **A-PP**: four nodes of two stages without a flush; gradients are of the weights that the forward used.
- {NUM_TASKS} tasks, {TASKS_PER_S} a second in all: requests come at {TASKS_PER_S} (1 - training rate) a
  second, the next batch when its predecessor is applied (A-PP: has left stage 0). A batch is one text. The
  optimizer is AdamW at {LEARNING_RATE:g}, without warm-up.
- Nodes of `{LEMIX}`, `round_robin` (Mix-RR) and `least_loaded` (Mix-LUF) never share their weights, as in the
  paper. `{AS_IN_THE_PAPER.label}` (Separate) shares after as many batches as there: half of the run's, at
  most 100. Its nodes then go on from the mean of those that have trained, where the paper's load the weights
  of one.

The paper's numbers are of other models (its GPT of 400M, 1.4B and 2.5B, here `gpt2-small`, `-medium` and
`-large`), other data (HH-RLHF), 334 tasks in batches of three and a learning rate of 5e-5. It does not say at
which rate its requests came. Compare the order of the policies and the ratios, not the level."""


def learning(*, quick: bool) -> Study:
    return Study(
        name="learning",
        title="Inference loss while the model learns",
        about=ABOUT,
        cells=list(_cells(quick)),
        run=run,
        report=report,
        max_workers=1 if quick else None,  # each process loads torch
    )


def run(cell: Cell) -> Metrics:
    """One run; only the process that makes it loads torch."""
    from lemix.studies.learning_run import run_learning

    return run_learning(cell)


def _cells(quick: bool) -> Iterable[Cell]:
    for labels in grid(
        **{
            PARALLELISM: ["S-PP"] if quick else list(CLUSTERS),
            TRAINING_RATE: [MIDDLE] if quick else paper.TRAINING_RATES,
        }
    ):
        if labels[PARALLELISM] not in OF_THE_PAPER and labels[TRAINING_RATE] != MIDDLE:
            continue
        for contender in CONTENDERS[::3] if quick else CONTENDERS:
            for seed in SEEDS[:1] if quick else SEEDS:
                yield _cell(labels, contender, seed, QUICK_TASKS if quick else NUM_TASKS)


def _cell(labels: Mapping[str, Label], contender: Contender, seed: int, num_tasks: int) -> Cell:
    training_rate = float(labels[TRAINING_RATE])
    cluster = CLUSTERS[str(labels[PARALLELISM])]
    sharing = {}
    if contender is AS_IN_THE_PAPER:
        sharing = {"merge": "average", "merge_every": merge_every(training_rate, num_tasks, cluster["nodes"])}
    training = {"microbatches": 1, "learning_rate": LEARNING_RATE, **sharing}
    return cell(
        MODEL,
        contender,
        Load(rate_per_s=TASKS_PER_S * (1 - training_rate), training_rate=training_rate, num_tasks=num_tasks),
        seed=seed,
        labels=labels,
        cluster={**cluster, "trainer_settings": training},
        workload={"batch_size": 1},
    )


def merge_every(training_rate: float, num_tasks: int, num_nodes: int) -> int:
    """Batches a node between two merges that make as many batches in all as between two of the paper's
    synchronisations, or as near as whole numbers come.
    """
    num_batches = round(num_tasks * training_rate)
    return max(1, round(min(100, num_batches // 2) / num_nodes))
