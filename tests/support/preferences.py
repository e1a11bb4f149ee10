"""Batches of preferences for a node, and their loss as one process computes it from the formula."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared.messages.training import Microbatch, MicrobatchForward
from tests.support.models import VOCAB_SIZE

BETA = 0.3


@dataclass(frozen=True)
class Pair:
    """A prompt and two answers to it, as tokens."""

    prompt: list[int]
    preferred: list[int]
    other: list[int]

    @property
    def sequences(self) -> list[list[int]]:
        return [self.prompt + self.preferred, self.prompt + self.other]


def random_pairs(num_pairs: int, *, seed: int = 5) -> list[Pair]:
    """Prompts of 2 to 5 tokens, answers of 1 to 6."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        drawn: list[int] = torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()
        return drawn

    return [Pair(tokens(2, 5), tokens(1, 6), tokens(1, 6)) for _ in range(num_pairs)]


def preference_messages(
    batch_id: str, microbatches: Sequence[Sequence[Pair]], *, fence: int = 1, **changes: Any
) -> list[MicrobatchForward]:
    """The batch as the trainer would feed it; `changes` to each microbatch."""
    num_pairs = sum(len(pairs) for pairs in microbatches)
    forwards = []
    for index, pairs in enumerate(microbatches):
        tokens: list[int] = []
        rows: list[int] = []
        for pair in pairs:
            for sequence in pair.sequences:
                rows += range(len(tokens) + len(pair.prompt) - 1, len(tokens) + len(sequence) - 1)
                tokens += sequence
        microbatch = Microbatch(
            fence=fence,
            batch_id=batch_id,
            index=index,
            count=len(microbatches),
            lengths=tuple(len(each) for pair in pairs for each in pair.sequences),
            label_rows=tuple(rows),
            labels=tuple(tokens[row + 1] for row in rows),
            loss_weight=1 / num_pairs,
            beta=BETA,
            **changes,
        )
        forwards.append(MicrobatchForward(microbatch=microbatch, tokens=tuple(tokens)))
    return forwards


def dpo_loss(model: Any, given: Any, microbatches: Sequence[Sequence[Pair]]) -> Tensor:
    """The mean over the pairs of -log sigmoid(beta * (gain of the preferred - gain of the other))."""

    def gain(prompt: list[int], answer: list[int]) -> Tensor:
        with torch.no_grad():
            before = _logprob(given, prompt, answer)
        return _logprob(model, prompt, answer) - before

    margins = torch.stack(
        [
            gain(pair.prompt, pair.preferred) - gain(pair.prompt, pair.other)
            for pairs in microbatches
            for pair in pairs
        ]
    )
    return -torch.log(1 / (1 + torch.exp(-BETA * margins))).mean()


def _logprob(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """log p(answer | prompt), each token's on its own."""
    logprobs = torch.log_softmax(model(torch.tensor([prompt + answer])).logits[0].float(), dim=-1)
    return torch.stack([logprobs[len(prompt) - 1 + n, token] for n, token in enumerate(answer)]).sum()
