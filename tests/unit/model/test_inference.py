"""Stages over a paged cache give what transformers gives for the whole model."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from services.stage_worker.compute.attention.iteration import PagedAttention
from services.stage_worker.compute.kv_cache import PagedKVCache
from shared.model.fast_inference import enable_fast_inference
from shared.model.loader import load_stage
from shared.model.partition import partition
from shared.model.stage import Stage

BLOCK_SIZE = 4
NUM_TOKENS = 10
PROMPT_LENGTHS = (1, 3, 17, 6)
ADMITTED_AT = (0, 0, 2, 3)
FAMILIES = ["llama", "llama-tied", "qwen2", "qwen2-window", "qwen3", "mistral-window", "gpt2", "gpt-neox"]


@dataclass
class Sequence:
    tokens: list[int]
    blocks: list[int]
    admitted_at: int
    wanted: int
    num_cached: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return len(self.tokens) == self.wanted


class Node:
    """All stages of a model, one after the other, with iterations of mixed sequences."""

    def __init__(self, stages: list[Stage]) -> None:
        self.stages = stages
        config = stages[0].config
        num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.caches = [
            PagedKVCache(stage.layers.num_layers, 64, BLOCK_SIZE, num_kv_heads, head_dim) for stage in stages
        ]

    @torch.no_grad()
    def iterate(self, sequences: list[Sequence], chunk_tokens: int) -> None:
        takes = [min(chunk_tokens, len(s.tokens) - s.num_cached) for s in sequences]
        chunks = [(s.num_cached, take, s.blocks) for s, take in zip(sequences, takes, strict=True)]
        positions = torch.tensor([p for start, take, _ in chunks for p in range(start, start + take)])
        rows = [s.tokens[start : start + take] for s, (start, take, _) in zip(sequences, chunks, strict=True)]
        hidden = torch.tensor([token for row in rows for token in row])
        last_rows = torch.tensor(takes).cumsum(0) - 1
        for stage, cache in zip(self.stages, self.caches, strict=True):
            hidden = stage.forward(hidden, positions, PagedAttention(cache, chunks), last_rows)
        for sequence, take, logits in zip(sequences, takes, hidden, strict=True):
            sequence.num_cached += take
            if sequence.num_cached == len(sequence.tokens):
                sequence.logits.append(logits)
                sequence.tokens.append(int(logits.argmax()))

    def run(self, sequences: list[Sequence], chunk_tokens: int) -> None:
        iteration = 0
        while not all(s.is_done for s in sequences):
            going = [s for s in sequences if s.admitted_at <= iteration and not s.is_done]
            self.iterate(going, chunk_tokens)
            iteration += 1


def make_sequences(vocab_size: int) -> list[Sequence]:
    rng = random.Random(1)
    free = rng.sample(range(64), 64)
    return [
        Sequence(
            tokens=[rng.randrange(vocab_size) for _ in range(length)],
            blocks=[free.pop() for _ in range(-(-(length + NUM_TOKENS) // BLOCK_SIZE))],
            admitted_at=admitted_at,
            wanted=length + NUM_TOKENS,
        )
        for length, admitted_at in zip(PROMPT_LENGTHS, ADMITTED_AT, strict=True)
    ]


def check_against(model: Any, sequences: list[Sequence]) -> None:
    for sequence, length in zip(sequences, PROMPT_LENGTHS, strict=True):
        prompt = torch.tensor([sequence.tokens[:length]])
        answer = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        assert sequence.tokens == answer[0].tolist()
        with torch.no_grad():
            expected = model(torch.tensor([sequence.tokens[:-1]])).logits[0, length - 1 :]
        torch.testing.assert_close(torch.stack(sequence.logits), expected, rtol=0, atol=1e-4)


def load_node(folder: Path, num_stages: int) -> Node:
    return Node([load_stage(folder, layers) for layers in partition(5, num_stages)])


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate(
    family: str, num_stages: int, model_folder: Callable[[str], Path], whole_model: Callable[..., Any]
) -> None:
    node = load_node(model_folder(family), num_stages)
    sequences = make_sequences(node.stages[0].vocab_size)
    node.run(sequences, chunk_tokens=5)
    check_against(whole_model(family), sequences)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_the_size_of_chunks_changes_nothing(
    family: str, chunk_tokens: int, model_folder: Callable[[str], Path], whole_model: Callable[..., Any]
) -> None:
    node = load_node(model_folder(family), 2)
    sequences = make_sequences(node.stages[0].vocab_size)
    node.run(sequences, chunk_tokens)
    check_against(whole_model(family), sequences)


@pytest.mark.parametrize("family", FAMILIES)
def test_fast_inference_gives_the_same(
    family: str, model_folder: Callable[[str], Path], whole_model: Callable[..., Any]
) -> None:
    node = load_node(model_folder(family), 2)
    for stage in node.stages:
        enable_fast_inference(stage).prepare()
    sequences = make_sequences(node.stages[0].vocab_size)
    node.run(sequences, chunk_tokens=5)
    check_against(whole_model(family), sequences)


def test_decode_rows_between_chunks_keep_their_places(model_folder: Callable[[str], Path]) -> None:
    stage = load_stage(model_folder("llama"), partition(5, 1)[0])
    tokens = torch.arange(12) % stage.vocab_size
    positions = torch.tensor([0, 0, 1, 2, 0, 0, 1, 2, 3, 0, 0, 1])
    lengths = (1, 3, 1, 4, 1, 2)

    def run(order: list[int]) -> dict[int, torch.Tensor]:
        rows = [torch.arange(12).split(lengths)[number] for number in order]
        cache = PagedKVCache(5, 8, BLOCK_SIZE, 2, 8)
        chunks = [(0, lengths[number], [number]) for number in order]
        flat = torch.cat(rows)
        with torch.no_grad():
            logits = stage.forward(tokens[flat], positions[flat], PagedAttention(cache, chunks))
        return dict(zip(order, logits.split([lengths[number] for number in order]), strict=True))

    mixed, sorted_by_length = run([0, 1, 2, 3, 4, 5]), run([0, 2, 4, 1, 3, 5])
    for number in range(6):
        torch.testing.assert_close(mixed[number], sorted_by_length[number], rtol=0, atol=1e-5)


def test_rows_of_logits_are_chosen(model_folder: Callable[[str], Path]) -> None:
    stage = load_stage(model_folder("gpt2"), partition(5, 1)[0])
    tokens = torch.arange(6)

    def logits(rows: torch.Tensor | None) -> torch.Tensor:
        cache = PagedKVCache(5, 8, BLOCK_SIZE, 4, 8)
        with torch.no_grad():
            return stage.forward(tokens, tokens, PagedAttention(cache, [(0, 6, [3, 1])]), rows)

    torch.testing.assert_close(logits(torch.tensor([4, 1])), logits(None)[[4, 1]])
