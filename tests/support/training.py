"""Training batches for a node, and the single-process loop that they are compared with."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from services.stage_worker.compute.weights import StageWeights, WeightsVersion
from shared.messages.training import Microbatch, MicrobatchForward
from tests.support.models import VOCAB_SIZE

LEARNING_RATE = 1e-3
ADAMW: dict[str, float] = {
    "optimizer_beta1": 0.9,
    "optimizer_beta2": 0.95,
    "optimizer_epsilon": 1e-3,
    "weight_decay": 0.01,
}
"""The large epsilon keeps AdamW from blowing up rounding errors of gradients that are zero in theory."""

LORA: dict[str, Any] = {"adapter": "lora", "lora_rank": 4, "lora_alpha": 12}
BFLOAT16: dict[str, Any] = {"dtype": "bfloat16"}
"""Settings that stages may have beside `ADAMW`."""

Example = list[int]
Batch = list[list[Example]]
"""Microbatches of examples; every token but the first is a label."""


def settings_id(value: object) -> str | None:
    """For `parametrize`, of settings what they choose, as `lora-bfloat16`; all else as pytest calls it."""
    if not isinstance(value, dict):
        return None
    return "-".join(each for each in value.values() if isinstance(each, str)) or "default"


def random_batches(num_batches: int, num_microbatches: int, *, seed: int = 11) -> list[Batch]:
    """Examples of 4 to 12 random tokens, two in each microbatch."""
    generator = torch.Generator().manual_seed(seed)

    def example() -> Example:
        length = int(torch.randint(4, 13, (), generator=generator))
        tokens: Example = torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()
        return tokens

    return [[[example(), example()] for _ in range(num_microbatches)] for _ in range(num_batches)]


def named(batches: Sequence[Batch]) -> dict[str, Batch]:
    """Under the ids b0, b1, ..."""
    return {f"b{number}": batch for number, batch in enumerate(batches)}


def num_labels(batch: Batch) -> int:
    return sum(len(example) - 1 for microbatch in batch for example in microbatch)


@contextmanager
def training_forward(weights: StageWeights) -> Iterator[WeightsVersion]:
    """Run a stage as a microbatch's forward does; graphs recorded inside keep the weights."""
    version = weights.to_train()
    with weights.installed(version):
        yield version
    weights.forward_done(version)


def messages(batch_id: str, batch: Batch, *, fence: int = 1) -> list[MicrobatchForward]:
    """The batch as the trainer would feed it."""
    return [
        MicrobatchForward(
            microbatch=_header(batch_id, index, len(batch), examples, num_labels(batch), fence),
            tokens=tuple(token for example in examples for token in example),
        )
        for index, examples in enumerate(batch)
    ]


def _header(
    batch_id: str, index: int, count: int, examples: Sequence[Example], labels: int, fence: int
) -> Microbatch:
    tokens = [token for example in examples for token in example]
    ends = torch.tensor([len(example) for example in examples]).cumsum(0).tolist()
    rows = [row for row in range(len(tokens)) if row + 1 not in ends]
    return Microbatch(
        fence=fence,
        batch_id=batch_id,
        index=index,
        count=count,
        lengths=tuple(len(example) for example in examples),
        label_rows=tuple(rows),
        labels=tuple(tokens[row + 1] for row in rows),
        loss_weight=1 / labels,
    )


def loss_of(
    model: Any,
    parameters: dict[str, Tensor],
    examples: Iterable[Example],
    labels: int,
    *,
    tie_weights: bool = True,
) -> Tensor:
    """Share of the examples in the batch's mean loss, each example on its own through the unsplit model.

    Without `tie_weights` the places of a tied parameter have a value each.
    """
    device = next(iter(parameters.values())).device
    total = torch.zeros((), device=device)
    for example in examples:
        tokens = torch.tensor([example], device=device)
        logits = functional_call(model, parameters, (tokens,), tie_weights=tie_weights).logits[0].float()
        total = total + functional.cross_entropy(logits[:-1], tokens[0, 1:], reduction="sum")
    return total / labels


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            got[name], tensor, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def adamw(parameters: Iterable[Tensor]) -> torch.optim.AdamW:
    """The plain optimizer that the stages are compared with."""
    return torch.optim.AdamW(
        parameters,
        lr=LEARNING_RATE,
        betas=(ADAMW["optimizer_beta1"], ADAMW["optimizer_beta2"]),
        eps=ADAMW["optimizer_epsilon"],
        weight_decay=ADAMW["weight_decay"],
    )
