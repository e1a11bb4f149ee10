"""Two nodes that become one, against plain loops in one process; real gloo over loopback."""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import RefusedError
from shared.messages.cluster import RendezvousRequest
from shared.messages.training import TrainingFailed
from shared.subjects import RENDEZVOUS
from tests.support.dying_member import join_and_die
from tests.support.models import save_tiny_model
from tests.support.node import Answer, Node, running_node
from tests.support.pair import NUM_STAGES, Pair, group, state_of, step_together, train, two_nodes
from tests.support.plain import OUTER, Plain, State, assert_close, assert_identical, diloco, is_weight, mean
from tests.support.reference import assert_served
from tests.support.saving import model_in
from tests.support.training import ADAMW, BFLOAT16, LORA, Batch, random_batches, settings_id

BATCHES = random_batches(8, 2, seed=6)
"""Whose gradients of the tiny models bfloat16 changes by less than a tenth; of some seeds by half."""
VARIANTS = [
    ("llama", {}),
    ("llama_tied", {}),
    ("llama_tied", BFLOAT16),
    ("llama_tied", LORA),
    ("llama_tied", LORA | BFLOAT16),
]
PROMPT = [3, 14, 15, 92, 65, 35]


def of_training(state: State) -> State:
    """Without random generators: they are those of this process, and all stages'."""
    return {name: tensor for name, tensor in state.items() if not name.startswith("random.")}


def assert_matches(pair: Pair, got: State, expected: State) -> None:
    """In float32 to rounding. Gradients in bfloat16 are a few per cent off; so is, taken together, where they
    lead to.
    """
    got = of_training(got)
    assert got.keys() == expected.keys()
    if pair.dtype == torch.bfloat16:
        assert_near(got, expected, pair.plain().weights())
        return
    # A GPU adds up the gradient of an embedding in any order.
    rounding = 1 if pair.model.device.type == "cpu" else 10
    assert_close(got, expected, of_weights=rounding * 1e-6, of_gradients=rounding * 1e-5)


def assert_exactly(got: State, expected: State) -> None:
    """But for the rounding of a sum in float32."""
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-9, msg=name)


def assert_near(got: State, expected: State, start: State) -> None:
    """Taken together, weights lie where they should within 6 % of their way from `start`; each kind of what
    is remembered of gradients within 15 %.
    """
    errors, ways = defaultdict(list), defaultdict(list)
    for name, tensor in expected.items():
        kind = "weights" if is_weight(name) else name.partition(".")[0]
        errors[kind].append((got[name] - tensor).norm())
        ways[kind].append((tensor - start.get(name, 0.0)).norm())
    for kind, way in ways.items():
        limit = 0.06 if kind == "weights" else 0.15
        assert torch.stack(errors[kind]).norm() <= limit * torch.stack(way).norm(), kind


@pytest.mark.parametrize(("family", "settings"), VARIANTS, ids=settings_id)
async def test_steps_on_the_mean_of_gradients_equal_one_process(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    steps: list[list[Batch | None]] = [[BATCHES[0], BATCHES[1]], [None, BATCHES[2]], [BATCHES[3], BATCHES[4]]]
    async with two_nodes(family, tmp_path, **settings) as pair:
        for node in pair.nodes:
            node.orders_steps = False
        for number, batches in enumerate(steps):
            await step_together(pair, batches, number)
        states = await pair.states()

    plain = pair.plain()
    for batches in steps:
        gradients = [plain.gradients(batch) for batch in batches if batch]
        plain.step([torch.stack(each).mean(dim=0) for each in zip(*gradients, strict=True)])
    assert_identical(*states)
    assert_matches(pair, states[0], plain.state())


@pytest.mark.parametrize(("family", "settings"), VARIANTS, ids=settings_id)
async def test_a_merge_is_the_mean_of_what_nodes_have_learnt_apart(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    shares = (2 / 3, 1 / 3)
    async with two_nodes(family, tmp_path, **settings) as pair:
        first, second = pair.nodes
        await train(first, "a0", BATCHES[0])
        await train(first, "a1", BATCHES[1])
        await train(second, "b0", BATCHES[2])
        before = [of_training(state) for state in await pair.states("before")]
        await pair.merge("merge-1", *shares, version=3)
        states = await pair.states()

    apart = [pair.plain(), pair.plain()]
    apart[0].train(BATCHES[0])
    apart[0].train(BATCHES[1])
    apart[1].train(BATCHES[2])
    assert_identical(*states)
    assert_matches(pair, states[0], mean([each.state() for each in apart], shares))
    assert_exactly(states[0], mean(before, shares))


async def test_nodes_that_compute_in_different_dtypes_share_their_masters(tmp_path: Path) -> None:
    async with two_nodes("llama_tied", tmp_path, of_each=[{}, BFLOAT16]) as pair:
        for node in pair.nodes:
            await train(node, "b0", BATCHES[node.number])
        before = [of_training(state) for state in await pair.states("before")]
        await pair.merge("merge-1", 0.5, 0.5, version=2)
        states = await pair.states()
    assert_identical(*states)
    assert_exactly(states[0], mean(before, [0.5, 0.5]))


@pytest.mark.parametrize("settings", [{}, BFLOAT16, LORA, {"optimizer": "nadamw"}], ids=settings_id)
async def test_a_node_that_has_learnt_nothing_gets_what_the_other_has(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    async with two_nodes("llama", tmp_path, **settings) as pair:
        first, second = pair.nodes
        await train(first, "a0", BATCHES[0])
        before = await pair.state(first, "before")
        await pair.merge("merge-1", 1.0, 0.0, version=1)
        assert_identical(await pair.state(second, "after"), before)


def no_momentum(plain: Plain) -> State:
    return {name: torch.zeros_like(weight) for name, weight in plain.weights().items()}


@pytest.mark.parametrize(("family", "settings"), VARIANTS[1:], ids=settings_id)
async def test_three_outer_steps_equal_a_plain_loop_of_diloco_across_a_restart(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    async with two_nodes(family, tmp_path, merge="outer", **settings) as pair:
        for number in range(3):
            for node in pair.nodes:
                await train(node, f"b{number}-{node.number}", BATCHES[2 * number + node.number])
            version = 2 * number + 2
            await pair.merge(f"merge-{number}", 0.5, 0.5, version=version, outer=OUTER)
            saved = await pair.state(pair.nodes[0], f"step-{version}")
            if number == 0:  # as one that comes back: from the other's checkpoint
                await train(pair.nodes[1], "lost", BATCHES[7])
                folder = tmp_path / "checkpoints" / f"step-{version}"
                await pair.nodes[1].restore(fence=3, version=version, checkpoint=str(folder))
        states = await pair.states()

    apart = [pair.plain(), pair.plain()]
    state, momentum = apart[0].weights(), no_momentum(apart[0])
    for number in range(3):
        for place, plain in enumerate(apart):
            plain.train(BATCHES[2 * number + place])
        state = diloco(state, momentum, mean([plain.state() for plain in apart], [0.5, 0.5]))
        for plain in apart:
            plain.hold(state)
    assert_identical(*states)
    assert_identical(saved, states[0])
    assert_matches(pair, states[0], state)


async def test_a_node_alone_makes_the_outer_step_too(tmp_path: Path) -> None:
    async with two_nodes("llama", tmp_path, merge="outer") as pair:
        await train(pair.nodes[0], "a0", BATCHES[0])
        await pair.nodes[0].merge(group("merge-1", 1.0), 1, OUTER)
        got = await pair.state(pair.nodes[0], "end")

    plain = pair.plain()
    start, momentum = plain.weights(), no_momentum(plain)
    plain.train(BATCHES[0])
    assert_matches(pair, got, diloco(start, momentum, plain.state()))


async def test_requests_are_answered_while_a_merge_waits_and_decode_through_it(tmp_path: Path) -> None:
    async with two_nodes("llama", tmp_path) as pair:
        first, second = pair.nodes
        await train(first, "a0", BATCHES[0])
        members = group("merge-1", 1.0, 0.0)
        merging = asyncio.create_task(first.merge(members, 7))
        whole = await first.complete([5, 9], max_tokens=8)
        assert not merging.done(), "the other node has not been asked yet"
        assert (len(whole.tokens), set(whole.versions)) == (8, {1})

        long = await first.start([3, 1, 4], max_tokens=600)
        await long.first_token()
        await asyncio.gather(merging, second.merge(members, 7))
        await long.end()
        assert (long.failure, len(long.tokens), long.finish) == (None, 600, "length")
        assert long.versions == sorted(long.versions)
        assert set(long.versions) == {1, 7}

        answers = [await node.complete([5, 9], max_tokens=20) for node in pair.nodes]
        assert answers[0].token_ids == answers[1].token_ids
        assert answers[0].token_ids[:8] == whole.token_ids


async def test_a_member_that_is_killed_in_a_merge_leaves_the_weights_as_they_were(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "model")
    async with running_node(tmp_path / "model", NUM_STAGES, tmp_path, **ADAMW) as node:
        await node.restore(fence=1)
        await train(node, "a0", BATCHES[0])
        before = await state_of(node, tmp_path, "before")
        spawn = get_context("spawn")
        dying = []
        for stage in range(NUM_STAGES):
            place = RENDEZVOUS.at(node=0, stage=stage)
            met = await node.bus.request(place, RendezvousRequest(), timeout_s=60.0)
            dying.append(spawn.Process(target=join_and_die, args=(met.address, "0.1-1.2")))
            dying[-1].start()
        with pytest.raises(RefusedError, match="PeerLostError"):
            await node.merge(group("merge-1", 0.5, 0.5), 3)
        for process in dying:
            process.join()
        assert_identical(await state_of(node, tmp_path, "after"), before)
        answer = await node.complete([5, 9], max_tokens=8)
        assert (len(answer.tokens), set(answer.versions)) == (8, {1})
        await train(node, "a1", BATCHES[1])


async def test_a_member_that_does_not_come_is_waited_for_in_bounds(tmp_path: Path) -> None:
    async with two_nodes("llama", tmp_path, collective_timeout_s=0.5) as pair:
        with pytest.raises(RefusedError, match=r"\[1\] did not come"):
            await pair.nodes[0].merge(group("merge-1", 0.5, 0.5), 3)


@pytest.mark.parametrize(
    ("name", "values"), [("lora_targets", ("q_proj", "o_proj")), ("lora_alpha", (12, 24))]
)
async def test_adapters_that_are_not_alike_are_not_merged(
    name: str, values: Sequence[Any], tmp_path: Path
) -> None:
    """Their tensors have the same sizes, and a mean of them would mean nothing."""
    of_each = [{name: value} for value in values]
    async with two_nodes("llama", tmp_path, of_each=of_each, collective_timeout_s=0.5, **LORA) as pair:
        merges = (node.merge(group("merge-1", 0.5, 0.5), 2) for node in pair.nodes)
        refusals = await asyncio.gather(*merges, return_exceptions=True)
    assert [type(refusal) for refusal in refusals] == [RefusedError] * 2
    assert f"LEMIX_{name.upper()}={values[0]} on node 0 and {values[1]} on node 1" in str(refusals[1])


async def test_a_merge_of_another_fence_or_without_its_first_member_is_refused(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "model")
    async with running_node(tmp_path / "model", NUM_STAGES, tmp_path, number=1) as node:
        await node.restore(fence=2)
        with pytest.raises(RefusedError, match="fence 1 is not 2"):
            await node.merge(group("m", 0.5, 0.5), 3, fence=1)
        with pytest.raises(RefusedError, match="node 0 does not say where to meet"):
            await node.merge(group("m", 0.5, 0.5), 3)


async def test_gradients_that_find_no_peer_fail_the_batch_without_fault(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "model")
    async with running_node(tmp_path / "model", NUM_STAGES, tmp_path, number=1) as node:
        await node.restore(fence=2)
        await node.reduce(group("merge-1", 1.0, 0.0), "")
        report = await node.report()
    event = report.event
    assert isinstance(event, TrainingFailed)
    assert (event.batch_id, event.is_batch_at_fault) == ("merge-1", False)


@pytest.mark.parametrize(("family", "settings"), VARIANTS, ids=settings_id)
async def test_a_checkpoint_of_merged_weights_is_every_nodes(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    async with two_nodes(family, tmp_path, **settings) as pair:
        first, second = pair.nodes
        await train(first, "a0", BATCHES[0])
        await train(second, "b0", BATCHES[1])
        await pair.merge("merge-1", 0.5, 0.5, version=2)
        await pair.state(first, "merged")
        await train(first, "a1", BATCHES[2])
        await train(second, "lost", BATCHES[3])
        checkpoint = tmp_path / "checkpoints" / "merged"
        await second.restore(fence=3, version=2, checkpoint=str(checkpoint))
        await train(second, "a1", BATCHES[2])
        assert_identical(*await pair.states())


async def asked(node: Node) -> Answer:
    answer = await node.complete(PROMPT, max_tokens=12, num_logprobs=0, prompt_logprobs=True)
    assert set(answer.versions) == {node.version}
    return answer


def logprobs(answer: Answer) -> list[float]:
    """The log-probabilities of prompt and answer."""
    return [token.logprob for token in (*answer.prompt, *answer.tokens)]


@pytest.mark.parametrize(("family", "settings"), VARIANTS, ids=settings_id)
async def test_answers_after_a_merge_are_those_of_its_checkpoint(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoints" / "merged"
    async with two_nodes(family, tmp_path, **settings) as pair:
        first, second = pair.nodes
        for node, batch in zip(pair.nodes, BATCHES, strict=False):
            node.learning_rate = 0.05
            await train(node, "b0", batch)
        apart = [await asked(node) for node in pair.nodes]
        await pair.merge("merge-1", 0.5, 0.5, version=2)
        merged = [await asked(node) for node in pair.nodes]
        await pair.state(first, checkpoint.name)
        await train(second, "lost", BATCHES[2])
        apart.append(await asked(second))
        await second.restore(fence=3, version=2, checkpoint=str(checkpoint))
        loaded = await asked(second)
    assert logprobs(merged[0]) == pytest.approx(logprobs(merged[1]), abs=1e-5)
    assert logprobs(merged[0]) == pytest.approx(logprobs(loaded), abs=1e-5)
    whole = model_in(checkpoint, tmp_path / "model").to(pair.dtype)
    assert_served(merged[0], whole, tolerance=0.5 if pair.dtype == torch.bfloat16 else 1e-4)
    for answer in apart:
        assert logprobs(merged[0]) != pytest.approx(logprobs(answer), abs=1.0)


@pytest.mark.parametrize(("family", "settings"), VARIANTS, ids=settings_id)
async def test_a_pinned_request_goes_on_with_its_version_through_a_merge(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    async with two_nodes(family, tmp_path, serving="pinned", training_patience_s=0.0, **settings) as pair:
        first, second = pair.nodes
        old = await first.start(PROMPT, max_tokens=3000)
        await old.first_token()
        for node, batch in zip(pair.nodes, BATCHES, strict=False):
            node.keeps, node.learning_rate = True, 0.05
            await train(node, "b0", batch)
        await pair.merge("merge-1", 0.5, 0.5, version=2)
        for node in pair.nodes:
            await node.publish(2)
            await node.until_published(2)
        merged = [await asked(node) for node in pair.nodes]
        num_tokens = len(old.tokens)
        await first.cancel(old)
        await second.restore(fence=3)
        again = await second.complete(PROMPT, max_tokens=num_tokens)
    assert logprobs(merged[0]) == pytest.approx(logprobs(merged[1]), abs=1e-5)
    assert set(old.versions) == {0}
    assert old.token_ids[:num_tokens] == again.token_ids
