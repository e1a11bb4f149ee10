"""The static decode step gives, token for token, what iterations give that run as they come."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from services.stage_worker.compute.attention.chunks import Chunk
from services.stage_worker.compute.attention.iteration import PagedAttention
from services.stage_worker.compute.decode_step import Bucket, DecodeStep, buckets
from services.stage_worker.compute.graphs import run_again
from services.stage_worker.compute.kv_cache import PagedKVCache
from services.stage_worker.compute.sampling.step import Kind
from shared.model.fast_inference import enable_fast_inference
from shared.model.loader import load_stage, model_partition, read_config
from shared.model.stage import Stage
from tests.support.models import save_tiny_model

BLOCK_SIZE, NUM_BLOCKS, MAX_ROWS, MAX_BLOCKS = 4, 64, 4, 8


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            save_tiny_model(family, made[family])
        return made[family]

    return folder


@dataclass
class Sequence:
    tokens: list[int]
    wanted: int
    blocks: list[int]
    num_cached: int = 0
    drawn: list[int] = field(default_factory=list)


class Node:
    """Stages one after the other, each with a cache of its own; `steps`: decode rows go by static steps."""

    def __init__(self, folder: Path, num_stages: int, *, steps: bool, fast: bool = False) -> None:
        layers = model_partition(read_config(folder), num_stages)
        self.stages = [load_stage(folder, one) for one in layers]
        config = self.stages[0].config
        num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.caches = [
            PagedKVCache(stage.layers.num_layers, NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, head_dim)
            for stage in self.stages
        ]
        if fast:
            for stage in self.stages:
                enable_fast_inference(stage).prepare()
        self.steps = [
            DecodeStep(stage, cache, max_rows=MAX_ROWS, max_blocks=MAX_BLOCKS)
            for stage, cache in zip(self.stages, self.caches, strict=True)
        ]
        self.num_steps = 0
        self._uses_steps = steps
        with torch.inference_mode():
            for step in self.steps:
                step.prepare(run_again)

    @torch.inference_mode()
    def iterate(self, chunks: list[tuple[Sequence, int]]) -> None:
        pieces = [Chunk(each.num_cached, count, each.blocks) for each, count in chunks]
        rows = [token for each, count in chunks for token in each.tokens[each.num_cached :][:count]]
        hidden = torch.tensor(rows)
        for stage, cache, step in zip(self.stages, self.caches, self.steps, strict=True):
            bucket = step.bucket_of(pieces) if self._uses_steps else None
            if bucket is not None:
                self.num_steps += 1
                inputs = rows if stage.layers.is_first else hidden
                hidden = step.run(bucket, pieces, inputs).clone()
            else:
                hidden = self._as_they_come(stage, cache, pieces, hidden)
        self._draw(chunks, hidden)

    def _as_they_come(self, stage: Stage, cache: PagedKVCache, pieces: list[Chunk], hidden: Tensor) -> Tensor:
        positions = torch.tensor([place for each in pieces for place in range(each.start, each.end)])
        return stage.forward(hidden, positions, PagedAttention(cache, pieces))

    def _draw(self, chunks: list[tuple[Sequence, int]], logits: Tensor) -> None:
        end = 0
        for each, count in chunks:
            end += count
            each.num_cached += count
            if each.num_cached == len(each.tokens):
                each.tokens.append(int(logits[end - 1].argmax()))
                each.drawn.append(each.tokens[-1])


def publish(node: Node, seed: int) -> None:
    """As a step of training: in place."""
    for stage in node.stages:
        with torch.no_grad():
            for name, parameter in sorted(stage.named_tensors().items()):
                noise = torch.Generator().manual_seed(seed + len(name))
                parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.02)


def play(data: st.DataObject, nodes: list[Node]) -> None:
    """The same arrivals, chunks, preemptions and publications on both nodes."""
    both: list[list[Sequence]] = [[] for _ in nodes]
    free = list(range(NUM_BLOCKS))
    for number in range(data.draw(st.integers(4, 14))):
        if data.draw(st.booleans()) and len(free) >= MAX_BLOCKS + 1:
            prompt = data.draw(st.lists(st.integers(0, 90), min_size=1, max_size=9))
            blocks = [free.pop(data.draw(st.integers(0, len(free) - 1))) for _ in range(MAX_BLOCKS + 1)]
            wanted = data.draw(st.integers(1, 12))
            for running in both:
                running.append(Sequence(list(prompt), wanted, blocks))
        if both[0] and data.draw(st.integers(0, 7)) == 0:
            place = data.draw(st.integers(0, len(both[0]) - 1))
            for running in both:
                running[place].num_cached = 0  # preempted: all of it is computed again
        if data.draw(st.integers(0, 5)) == 0:
            for node in nodes:
                publish(node, number)
        takes = [data.draw(st.integers(1, 5)) for _ in both[0]]
        for node, running in zip(nodes, both, strict=True):
            chunks = [
                (each, min(take, len(each.tokens) - each.num_cached))
                for each, take in zip(running, takes, strict=True)
            ]
            if chunks:
                node.iterate(chunks)
        assert [each.drawn for each in both[0]] == [each.drawn for each in both[1]]
        for running in both:
            for done in [each for each in running if len(each.drawn) == each.wanted]:
                running.remove(done)
                if running is both[0]:
                    free += done.blocks


@pytest.mark.parametrize(("family", "num_stages"), [("llama_tied", 1), ("gpt2", 2)])
@settings(max_examples=15)
@given(data=st.data())
def test_steps_change_no_token(
    data: st.DataObject, family: str, num_stages: int, folder_of: Callable[[str], Path]
) -> None:
    play(data, [Node(folder_of(family), num_stages, steps=steps) for steps in (True, False)])


@pytest.mark.parametrize("fast", [False, True])
def test_steps_take_decode_rows_whatever_lies_behind_their_ends(
    fast: bool, folder_of: Callable[[str], Path]
) -> None:
    nodes = [Node(folder_of("llama_tied"), 1, steps=steps, fast=fast) for steps in (True, False)]
    every_slot = torch.arange(NUM_BLOCKS * BLOCK_SIZE)
    for layer in range(nodes[0].caches[0].num_layers):
        pool = nodes[0].caches[0]
        left = torch.full((2 * pool.num_kv_heads, len(every_slot), pool.head_dim), float("nan"))
        pool.write(layer, every_slot, left)
    drawn = []
    for node in nodes:
        running = [
            Sequence([5, 7, 9], 20, [3, 9, 1, 2, 0, 8]),
            Sequence([11], 20, [20, 31, 4, 6, 40, 41]),
            Sequence([2, 4], 20, [5, 7, 10, 11, 12, 13]),
        ]
        node.iterate([(each, len(each.tokens)) for each in running])
        for _ in range(17):
            node.iterate([(each, 1) for each in running])
        drawn.append([each.drawn for each in running])
    assert drawn[0] == drawn[1]
    assert (nodes[0].num_steps, nodes[1].num_steps) == (17, 0)


def test_buckets_double_up_to_the_limits_and_the_largest_comes_first() -> None:
    sizes = buckets(6, 40)
    assert {one.num_rows for one in sizes} == {1, 2, 4, 6}
    assert {one.num_blocks for one in sizes} == {16, 32, 40}
    assert sizes[0] == Bucket(6, 40)
    assert sizes[-1] == Bucket(1, 16)
    assert len(sizes) == len({*sizes}) == 12


def test_the_smallest_bucket_is_taken_and_prompts_take_none(folder_of: Callable[[str], Path]) -> None:
    step = Node(folder_of("llama_tied"), 1, steps=True).steps[0]
    row = Chunk(30, 1, list(range(8)))
    assert step.bucket_of([row]) == Bucket(1, 8)
    assert step.bucket_of([row] * 3) == Bucket(4, 8)
    assert step.bucket_of([row] * 5) is None
    assert step.bucket_of([Chunk(32, 1, list(range(9)))]) is None
    assert step.bucket_of([row, Chunk(0, 2, [9])]) is None


@pytest.mark.parametrize("family", ["llama_tied", "gpt2"])
def test_a_step_reads_nothing_back(family: str, folder_of: Callable[[str], Path]) -> None:
    """Numbers that travel to the host cannot be captured: tensors without any have none to read."""
    node = Node(folder_of(family), 1, steps=True)
    with torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True):
        node.steps[0].prepare(lambda program: lambda: program())
        outputs = node.steps[0]._programs[Bucket(4, 8)]()
        sampler = node.steps[0]._sampler
        assert sampler is not None
        tokens = [sampler._programs[4, kind]() for kind in Kind]
    assert outputs.shape == (4, node.stages[0].vocab_size)
    assert {each.shape for each in tokens} == {(4,)}
