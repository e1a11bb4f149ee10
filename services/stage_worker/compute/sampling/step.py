"""Drawing inside a static decode step: the draws of `draw`, from numbers in fixed memory.

Shape letters: R rows of a bucket, V vocabulary, N numbers of a drawing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from math import inf
from typing import Final

import torch
from torch import Tensor

from services.stage_worker.compute.graphs import Capture, Program
from services.stage_worker.compute.readback import Readback
from services.stage_worker.compute.sampling.draw import (
    choose,
    drop_below_min_p,
    drop_below_place,
    drop_beyond_top_p,
    scale,
    uniform,
)
from shared.messages.inference import Sampling

NO_TOKEN: Final = -1
"""In the place of a token whose logits are not finite."""


class Kind(Enum):
    """The programs for drawing; each can do what those before it can."""

    GREEDY = auto()
    FROM_ALL = auto()
    """No token is left out, so nothing is sorted."""
    FROM_LIKELIEST = auto()


@dataclass(frozen=True, slots=True)
class Drawing:
    """A draw that needs nothing but the logits."""

    sampling: Sampling
    index: int
    """How many tokens the sequence has produced before."""

    @property
    def kind(self) -> Kind:
        one = self.sampling
        if one.temperature == 0:
            return Kind.GREEDY
        is_cut = one.top_k or one.top_p != 1 or one.min_p
        return Kind.FROM_LIKELIEST if is_cut else Kind.FROM_ALL

    @property
    def numbers(self) -> tuple[float, ...]:
        one = self.sampling
        top_p = one.top_p if one.top_p != 1 else inf  # a sum of rounded numbers may pass 1
        return one.temperature, one.top_k or inf, top_p, one.min_p, uniform(one.seed, self.index)

    def following(self) -> "Drawing | None":
        """The sequence's next draw; None: this is its last."""
        return Drawing(self.sampling, self.index + 1) if self.index + 1 < self.sampling.max_tokens else None


_NUM_NUMBERS: Final = 5


def sample(logits_RV: Tensor, numbers_RN: Tensor, kind: Kind) -> Tensor:
    """A token for each row [R], or NO_TOKEN. Reads nothing back, and launches the same for any numbers."""
    tokens_R = logits_RV.argmax(dim=-1)
    if kind is not Kind.GREEDY:
        temperatures_R = numbers_RN[:, 0]
        tokens_R = torch.where(temperatures_R > 0, _drawn(logits_RV, numbers_RN, kind), tokens_R)
    return tokens_R.masked_fill(~logits_RV.amax(dim=-1).isfinite(), NO_TOKEN)


def _drawn(logits_RV: Tensor, numbers_RN: Tensor, kind: Kind) -> Tensor:
    temperatures_R1, top_k_R1, top_p_R1, min_p_R1 = torch.split(numbers_RN[:, :4].float(), 1, dim=1)
    scaled_RV = scale(logits_RV.float(), temperatures_R1)
    if kind is Kind.FROM_LIKELIEST:
        places_R1 = top_k_R1.clamp(1, logits_RV.shape[1]).long() - 1  # rows that only fill up have 0
        likeliest_RV = scaled_RV.sort(dim=-1, descending=True).values
        scaled_RV = drop_below_place(scaled_RV, likeliest_RV, places_R1)
    probabilities_RV = torch.softmax(scaled_RV, dim=-1)
    if kind is Kind.FROM_LIKELIEST:
        probabilities_RV = drop_beyond_top_p(probabilities_RV, top_p_R1)
        probabilities_RV = drop_below_min_p(probabilities_RV, min_p_R1)
    return choose(probabilities_RV, numbers_RN[:, 4:])


class StepSampler:
    """Draws for the rows of a static step. The tokens stay on the device, where the next step finds them."""

    def __init__(self, *, max_rows: int, vocab_size: int, dtype: torch.dtype, device: str) -> None:
        self.logits_RV = torch.zeros(max_rows, vocab_size, dtype=dtype, device=device)
        """A step leaves its logits here."""
        self.tokens_R = torch.zeros(max_rows, dtype=torch.int64, device=device)
        """The last draw."""
        self._numbers_RN = torch.zeros(max_rows, _NUM_NUMBERS, dtype=torch.float64, device=device)
        self._programs: dict[tuple[int, Kind], Program] = {}

    def prepare(self, capture: Capture, sizes: Sequence[int]) -> None:
        """Make the programs for these numbers of rows."""
        for num_rows in sorted(sizes, reverse=True):
            for kind in Kind:
                self._programs[num_rows, kind] = capture(partial(self._sample, num_rows, kind))

    def draw(self, num_rows: int, drawings: Sequence[Drawing]) -> Readback:
        """Draw for the first rows of a step of `num_rows`: a token, or NO_TOKEN, for each drawing."""
        numbers = torch.tensor(
            [each.numbers for each in drawings], dtype=torch.float64, pin_memory=self._numbers_RN.is_cuda
        )
        self._numbers_RN[: len(drawings)].copy_(numbers, non_blocking=True)
        kind = max((each.kind for each in drawings), key=lambda one: one.value)
        return Readback(self._programs[num_rows, kind]()[: len(drawings)])

    def _sample(self, num_rows: int, kind: Kind) -> Tensor:
        tokens_R = sample(self.logits_RV[:num_rows], self._numbers_RN[:num_rows], kind)
        return self.tokens_R[:num_rows].copy_(tokens_R)
