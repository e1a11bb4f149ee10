"""Processes of two nodes that share their weights die at any point of a training run, in virtual time: both
nodes end with the same weights, which are those of a plain loop over the same steps; with a rollback, too.

Which batches nodes learn together depends on when messages come, and on who dies. So the loop is told it: the
steps of `allreduce` by the orders that were given last, the rounds of `average` and `outer` by what one
checkpoint contains more than the one before. What a batch adds, and when, it finds by itself.
"""

import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from lemix.simulation.loop import run_virtual
from services.trainer.merges import MAX_FAILURES
from shared.checkpoints import Checkpoint
from tests.chaos.test_kill_points import BATCHES, IDS, distance, examples, tensors_of
from tests.support.models import save_tiny_model
from tests.support.mortal_cluster import Kill, MortalCluster, victims
from tests.support.plain import (
    EPSILON,
    Plain,
    State,
    assert_close,
    assert_identical,
    diloco,
    mean,
)
from tests.support.training import ADAMW, LEARNING_RATE

NUM_NODES = 2
ASYNC_TOLERANCE = 0.4
"""L2 distance between two final sets of weights, as a share of how far the run moved them."""
VICTIM = st.sampled_from(victims(NUM_NODES))
TOGETHER = r"\.(merge|reduce|rendezvous|save|restore)\b"
"""What nodes are told when they do something together: few of all messages."""
GOING_BACK = r"\.(rollback|restore)\b"
ANY_KILL = st.builds(Kill, VICTIM, st.integers(1, 300))
KILL = ANY_KILL | st.builds(Kill, VICTIM, st.integers(1, 30), st.just(TOGETHER))
KILL_GOING_BACK = ANY_KILL | st.builds(Kill, VICTIM, st.integers(1, 20), st.just(GOING_BACK))


def stop_merges(kills: Sequence[Kill]) -> bool:
    """Training halts, as it should, when each of these breaks a merge."""
    return sum(kill.victim.startswith("stage") for kill in kills) >= MAX_FAILURES


def some_of(kill: st.SearchStrategy[Kill]) -> st.SearchStrategy[list[Kill]]:
    return st.lists(kill, min_size=1, max_size=4).filter(lambda kills: not stop_merges(kills))


@cache
def model_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="lemix-kill-points-"))
    save_tiny_model("llama_tied", folder)
    return folder


def train(
    schedule: str, merge: str, seed: int, kills: Sequence[Kill], run_dir: Path, *, goes_back: bool
) -> MortalCluster:
    """Until both nodes hold every batch. `seed`: of the times that messages take. `goes_back`: to the first
    durable version, which comes early then, as soon as there is a second one.
    """
    cluster = MortalCluster(
        model=model_folder(),
        run_dir=run_dir,
        seed=seed,
        trainer_settings={
            "schedule": schedule,
            "merge": merge,
            "merge_every": 1 if goes_back else 2,
            "learning_rate": LEARNING_RATE,
            "microbatches": 2,
            "checkpoint_every": 2 if goes_back else 3,
            "checkpoint_idle_s": 0.5,
            "keep_checkpoints": len(BATCHES),
        },
        stage_settings={
            "kv_tokens": 64,
            "merge": merge,
            "collective_timeout_s": 5.0,
            **ADAMW,
            "optimizer_epsilon": EPSILON,
        },
        kills=kills,
        num_nodes=NUM_NODES,
        goes_back=goes_back,
    )
    run_virtual(cluster.train(BATCHES))
    return cluster


def learnt(
    schedule: str, merge: str, seed: int, kills: Sequence[Kill], *, goes_back: bool = False
) -> tuple[State, State]:
    """What both nodes hold in the end, each batch once or discarded, and what a plain loop makes of it."""
    with tempfile.TemporaryDirectory() as run_dir:
        cluster = train(schedule, merge, seed, kills, Path(run_dir), goes_back=goes_back)
        durable = cluster.durable()
        saved = {name.partition(":")[2]: tensor for name, tensor in tensors_of(durable[-1]).items()}
    assert cluster.rejected() == []
    held, discarded = durable[-1].manifest.recent_batch_ids, durable[-1].manifest.discarded_batch_ids
    assert Counter([*held, *discarded]) == Counter(IDS), "each batch once"
    assert bool(discarded) == goes_back
    assert_identical(*cluster.states)
    assert_identical(cluster.states[0], saved)
    plain = Plain(AutoModelForCausalLM.from_pretrained(model_folder()))
    if merge == "allreduce":
        learn_together(plain, steps_of(cluster, held))
        return saved, plain.state()
    return saved, learn_apart(plain, rounds_of(durable), is_outer=merge == "outer")


@pytest.mark.parametrize("merge", ["allreduce", "average", "outer"])
@examples(3)
@given(seed=st.integers(0, 1000), kills=some_of(KILL))
def test_whoever_dies_both_nodes_hold_what_a_plain_loop_learns(
    merge: str, seed: int, kills: list[Kill]
) -> None:
    """Measured in 75 such runs: weights differ by 5e-7 at most, and the squares of gradients, which reach 10,
    by 5e-5 of them. A step that is missing moves weights by up to 1e-3, the learning rate.
    """
    got, expected = learnt("1f1b", merge, seed, kills)

    assert_close(got, expected, of_weights=5e-6, of_gradients=5e-4)


@pytest.mark.parametrize("merge", ["allreduce", "average"])
@examples(2)
@given(seed=st.integers(0, 1000), kills=some_of(KILL_GOING_BACK))
def test_a_rollback_meanwhile_takes_out_what_it_discards_and_nothing_else(
    merge: str, seed: int, kills: list[Kill]
) -> None:
    got, expected = learnt("1f1b", merge, seed, kills, goes_back=True)

    assert_close(got, expected, of_weights=5e-6, of_gradients=5e-4)


@examples(3)
@given(seed=st.integers(0, 1000), kills=some_of(KILL))
def test_without_a_flush_they_differ_by_no_more_than_delays_make_them(seed: int, kills: list[Kill]) -> None:
    """Under A-PP a gradient may lack the last step, as message times have it, and the loop's never does.
    Measured: that moves the weights by up to 0.23 of the way that they went, with deaths or without any.
    A batch that were lost or doubled would show in the ids.
    """
    got, expected = learnt("async", "average", seed, kills)

    way = distance(expected, Plain(AutoModelForCausalLM.from_pretrained(model_folder())).state())
    assert distance(got, expected) <= ASYNC_TOLERANCE * way


def steps_of(cluster: MortalCluster, held: Sequence[str]) -> list[list[int]]:
    """The numbers of the batches in each step. A version counts all batches up to it."""
    versions = sorted({cluster.version_of[batch_id] for batch_id in held})
    steps = [
        [number_of(each) for each in held if cluster.version_of[each] == version] for version in versions
    ]
    assert [sum(map(len, steps[: place + 1])) for place in range(len(steps))] == versions
    return steps


def rounds_of(durable: Sequence[Checkpoint]) -> list[list[int]]:
    """The numbers of the batches between two merges, those of each node in its order."""
    contents = [(), *(checkpoint.manifest.recent_batch_ids for checkpoint in durable)]
    return [[number_of(each) for each in new if each not in old] for old, new in pairwise(contents)]


def number_of(batch_id: str) -> int:
    return int(batch_id.removeprefix("b"))


def learn_together(plain: Plain, steps: Iterable[Sequence[int]]) -> None:
    """Each step on the mean of its batches' gradients."""
    for numbers in steps:
        gradients = [plain.gradients(BATCHES[number]) for number in numbers]
        plain.step([torch.stack(each).mean(dim=0) for each in zip(*gradients, strict=True)])


def learn_apart(plain: Plain, rounds: Iterable[Sequence[int]], *, is_outer: bool) -> State:
    """Each node on its own, then the mean, by how many batches each has learnt; with DiLoCo's step on it."""
    state = plain.state()
    momentum: State = {name: torch.zeros_like(value) for name, value in state.items()}
    for numbers in rounds:
        states, shares = [], []
        for node in range(NUM_NODES):
            if own := [number for number in numbers if number % NUM_NODES == node]:
                states.append(learn_alone(plain, state, own))
                shares.append(len(own) / len(numbers))
        merged = mean(states, shares)
        state = diloco(state, momentum, merged) if is_outer else merged
    return state


def learn_alone(plain: Plain, state: State, numbers: Iterable[int]) -> State:
    plain.hold(state)
    for number in numbers:
        plain.train(BATCHES[number])
    return plain.state()
