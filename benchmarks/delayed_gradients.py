"""The price of delayed gradients: held-out loss after the same tokens, by schedule, stashing, optimizer."""

import json
import statistics
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.virtual_pipeline import Part, VirtualPipeline, VirtualStage, loss_of
from services.stage_worker.compute.weights import StageWeights
from services.stage_worker.settings import OptimizerName
from services.stage_worker.training.optimizers import OptimizerSettings
from services.trainer.intake.microbatches import Rows, join, split
from services.trainer.nodes.learning_rate import LearningRate
from shared.encoding import LabelledTokens
from shared.messages.training import Microbatch
from shared.model.loader import load_stage, model_partition, read_config
from shared.pipeline import SCHEDULES, Schedule, double_buffered
from shared.schedule import ScheduleName, StashingName

NUM_STAGES = 4
NUM_PROCESSES = 2
WARMUP_BATCHES = 20
MAX_TOKENS = 2048
DATA = Path("lemix/data")
TOKENIZER = Path("shared/model/embedded/tokenizer.json")
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to train."""

    schedule: ScheduleName
    stashing: StashingName | Literal["none"]
    microbatches: int
    optimizer: OptimizerName


@dataclass(frozen=True, slots=True)
class Course:
    """How long to train, and the ways to compare. The first one is what the others are compared with."""

    num_passes: int
    peak_learning_rate: float
    seeds: range
    variants: tuple[Variant, ...]


SYNCHRONOUS = {optimizer: Variant("1f1b", "full", 1, optimizer) for optimizer in get_args(OptimizerName)}
"""Without delay it does not matter how a batch is cut."""
COURSES = {
    "four_passes": Course(
        4,
        1e-3,
        range(2),
        (
            SYNCHRONOUS["adamw"],
            Variant("async", "full", 4, "adamw"),
            Variant("async", "none", 4, "adamw"),
            SYNCHRONOUS["nadamw"],
            Variant("async", "full", 4, "nadamw"),
        ),
    ),
    "one_pass": Course(
        1,
        1e-3,
        range(2),
        (
            SYNCHRONOUS["adamw"],
            Variant("async", "full", 4, "adamw"),
            Variant("async", "full", 1, "adamw"),
            SYNCHRONOUS["nadamw"],
            Variant("async", "full", 4, "nadamw"),
            Variant("async", "full", 1, "nadamw"),
        ),
    ),
    "four_passes_at_a_high_rate": Course(
        4,
        3e-3,
        range(8),
        (
            SYNCHRONOUS["adamw"],
            Variant("async", "full", 1, "adamw"),
            Variant("async", "double", 1, "adamw"),
            Variant("async", "none", 1, "adamw"),
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class Corpus:
    """The bundled bulletins, in as many token ids as they use."""

    batches: tuple[tuple[tuple[int, ...], ...], ...]
    held_out: tuple[tuple[int, ...], ...]
    vocab_size: int


@cache
def corpus() -> Corpus:
    """The bulletins' tokens are a small part of the tokenizer's: the others would only take time."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    number_of: dict[int, int] = {}

    def tokens(text: str) -> tuple[int, ...]:
        return tuple(number_of.setdefault(token, len(number_of)) for token in tokenizer.encode(text).ids)

    lines = (DATA / "bulletins_train.jsonl").read_text(encoding="utf-8").splitlines()
    batches = tuple(
        tuple(
            tokens(example.get("text") or example["prompt"] + example["completion"]) for example in examples
        )
        for examples in (json.loads(line)["examples"] for line in lines)
    )
    held_out = (DATA / "bulletins_heldout.txt").read_text(encoding="utf-8").splitlines()
    return Corpus(batches, tuple(tokens(line) for line in held_out), len(number_of))


def model_folder(seed: int, base: Path) -> Path:
    """A random Llama of 4 layers."""
    folder = base / f"delayed-{seed}"
    if not (folder / "model.safetensors").exists():
        torch.manual_seed(seed)
        config = LlamaConfig(
            **SHAPE, vocab_size=corpus().vocab_size, max_position_embeddings=512, bos_token_id=None
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def parts_of(batch_id: str, examples: Sequence[tuple[int, ...]], num_microbatches: int) -> list[Part]:
    """A batch cut as the trainer cuts it; every token but each first is a label."""
    labelled = [LabelledTokens(tokens, tuple(range(len(tokens) - 1))) for tokens in examples]
    groups = split([len(tokens) for tokens in examples], num_microbatches, MAX_TOKENS)
    rows = [join([labelled[place] for place in group]) for group in groups]
    num_labels = sum(len(each.labels) for each in rows)
    return [
        Part(_microbatch(batch_id, index, len(rows), each, 1 / num_labels), each.tokens)
        for index, each in enumerate(rows)
    ]


def _microbatch(batch_id: str, index: int, count: int, rows: Rows, loss_weight: float) -> Microbatch:
    return Microbatch(
        fence=1,
        batch_id=batch_id,
        index=index,
        count=count,
        lengths=rows.lengths,
        label_rows=rows.label_rows,
        labels=rows.labels,
        loss_weight=loss_weight,
    )


def stages_of(folder: Path, variant: Variant) -> list[VirtualStage]:
    settings = OptimizerSettings(name=variant.optimizer)
    stages = [load_stage(folder, layers) for layers in model_partition(read_config(folder), NUM_STAGES)]
    return [
        VirtualStage(stage, StageWeights(stage, settings, version=0, stashing=variant.stashing))
        for stage in stages
    ]


def order_of(num_passes: int, seed: int) -> list[tuple[tuple[int, ...], ...]]:
    """The corpus, shuffled anew for every pass."""
    random = Random(seed)
    batches = list(corpus().batches)
    return [batch for _ in range(num_passes) for batch in random.sample(batches, len(batches))]


def schedule_of(variant: Variant) -> Schedule:
    schedule = SCHEDULES[variant.schedule]
    return double_buffered(schedule) if variant.stashing == "double" else schedule


def train(course: Course, variant: Variant, seed: int, work: Path) -> tuple[float, list[int]]:
    """Returns the held-out loss in nats a token, and the stages' largest delays in steps."""
    torch.set_num_threads(1)
    order = order_of(course.num_passes, seed)
    stages = stages_of(model_folder(seed, work), variant)
    rate = LearningRate(
        peak=course.peak_learning_rate,
        decay="cosine",
        warmup_batches=WARMUP_BATCHES,
        num_batches=len(order),
        final=0.0,
    )
    pipeline = VirtualPipeline(stages, schedule_of(variant), rate.at)
    pipeline.train({str(n): parts_of(str(n), batch, variant.microbatches) for n, batch in enumerate(order)})
    return loss_of(stages, corpus().held_out), pipeline.delays


def measure(course: Course, variant: Variant, work: Path, processes: Executor) -> dict[str, Any]:
    """All seeds of a variant, some side by side."""
    runs = list(processes.map(partial(train, course, variant, work=work), course.seeds))
    losses = [loss for loss, _ in runs]
    return {
        **asdict(variant),
        "held_out_loss": {"mean": statistics.mean(losses), "by_seed": losses},
        "largest_delay_by_stage": runs[0][1],
    }


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with its mean loss over that of the first one."""
    mean = rows[0]["held_out_loss"]["mean"]
    return [{**row, "over_synchronous": row["held_out_loss"]["mean"] / mean} for row in rows]


def run(course: Course, work: Path, processes: Executor) -> dict[str, Any]:
    num_tokens = sum(len(tokens) for batch in corpus().batches for tokens in batch)
    rows = [measure(course, variant, work, processes) for variant in course.variants]
    return {
        "num_batches": course.num_passes * len(corpus().batches),
        "num_tokens": course.num_passes * num_tokens,
        "peak_learning_rate": course.peak_learning_rate,
        "runs": compared(rows),
    }


async def main(work: Path) -> dict[str, Any]:
    with ProcessPoolExecutor(NUM_PROCESSES, mp_context=get_context("spawn")) as processes:
        courses = {name: run(course, work, processes) for name, course in COURSES.items()}
    return {"num_stages": NUM_STAGES, "model": SHAPE | {"vocab_size": corpus().vocab_size}, **courses}
