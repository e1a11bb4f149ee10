"""Training on one stage: forwards that keep their graphs, backwards that use them up."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Never

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional

from services.stage_worker.compute.slices import Slices
from services.stage_worker.compute.weights import StageWeights, WeightsVersion
from services.stage_worker.training.passes import PackedRows, Pass, Passes
from services.stage_worker.training.preferences import Reference, answer_logprobs, preference_loss
from shared.errors import LemixError
from shared.messages.training import Microbatch
from shared.model.attention import PackedSegments
from shared.model.cutting import cut
from shared.model.stage import Stage


@dataclass(slots=True)
class _InFlight:
    """A microbatch between its forward and its backward on this stage."""

    version: WeightsVersion
    forward: Pass | None
    """None: it is made again for the backward."""
    again: Callable[[], Slices[Pass]]
    """Makes it again, with the weights of the first time."""


class MicrobatchRunner:
    """Runs microbatches of one stage, in slices. All methods belong to the compute thread.

    With `checkpointing` only a microbatch's inputs are kept until its backward, which runs the forward again,
    with the weights of the first time. Not where the backward follows at once: nothing waits there.

    Shape letters: T rows of the microbatch, H hidden size, R rows that have a label, N sequences.
    """

    def __init__(
        self,
        stage: Stage,
        weights: StageWeights,
        device: torch.device,
        *,
        reference: Reference,
        num_slices: int = 1,
        checkpointing: bool = False,
    ) -> None:
        """`num_slices`: of each pass at most."""
        self._stage = stage
        self._weights = weights
        self._passes = Passes(cut(stage, num_slices), weights)
        self._reference = reference
        self._device = device
        self._checkpointing = checkpointing
        self._in_flight: dict[tuple[str, int], _InFlight] = {}

    @property
    def num_slices(self) -> int:
        """Slices of a pass."""
        return self._passes.num_slices

    def drop_all(self) -> None:
        """Forget everything in flight."""
        self._in_flight.clear()
        self._weights.drop_training()
        self._reference.drop()

    def reference(self, microbatch: Microbatch, inputs: Tensor) -> Slices[Tensor]:
        """Run preferences through the model as it was given; no backward follows.

        Returns activations [T, H], or on the last stage the log-probabilities [N] of the answers. They come
        of the same operations as those of the weights that train, so they differ only as the weights do.
        """
        answers = partial(answer_logprobs, microbatch=microbatch)
        passed = yield from self._passes.forward(
            self._reference.version, inputs, self._rows(microbatch), answers, _saving_nothing
        )
        return passed.outputs

    def forward(
        self, microbatch: Microbatch, inputs: Tensor, reference_N: Tensor | None = None
    ) -> Slices[tuple[int, Tensor]]:
        """Returns the weights version, and activations [T, H], or on the last stage the loss [].

        The loss is the microbatch's share of the batch's mean over labels, in nats, or over preferences: then
        the last stage needs what `reference` gives.
        """
        version, loss = self._weights.to_train(), partial(_loss, microbatch, reference_N)
        run = partial(self._passes.forward, version, inputs, self._rows(microbatch), loss)
        turns_at_once = self._stage.layers.is_last and not microbatch.backward_after_all
        is_kept = turns_at_once or not self._checkpointing
        passed = yield from run(self._saving(microbatch) if is_kept else _saving_nothing)
        self._weights.forward_done(version)
        self._in_flight[microbatch.batch_id, microbatch.index] = _InFlight(
            version, passed if is_kept else None, partial(run, nullcontext)
        )
        return version.number, passed.outputs

    def score(self, tokens: Sequence[int], inputs: Tensor) -> Tensor:
        """Run one sequence of T tokens with the newest weights, as for training; no backward follows.

        Returns activations [T, H], or on the last stage the log-probabilities [T - 1] of all tokens but the
        first. Graphs are recorded: without them requests' faster forwards would run.
        """
        tokens_T = torch.tensor(tokens, device=self._device)
        positions, segments = torch.arange(len(tokens), device=self._device), PackedSegments((len(tokens),))
        with self._weights.as_for_training(), torch.enable_grad():
            if not self._stage.layers.is_last:
                return self._stage.forward(inputs, positions, segments, None).detach()
            logits = self._stage.forward(inputs, positions, segments, positions[:-1]).detach()
        return -functional.cross_entropy(logits.float(), tokens_T[1:], reduction="none")

    def backward(self, batch_id: str, index: int, gradient: Tensor | None) -> Slices[Tensor | None]:
        """Backward with the gradient [T, H] of the activations, None of the loss on the last stage.

        Returns the gradient [T, H] of the inputs, None at stage 0.

        Raises LemixError when the microbatch is not in flight here.
        """
        microbatch = self._in_flight.pop((batch_id, index), None)
        if microbatch is None:
            raise LemixError(
                f"gradient for microbatch {index} of {batch_id}, which is not in flight on this stage"
            )
        passed = microbatch.forward
        if passed is None:
            passed = yield from microbatch.again()
            yield
        of_inputs = yield from self._passes.backward(passed, gradient)
        self._weights.backward_done(microbatch.version)
        return of_inputs

    def _saving(self, microbatch: Microbatch) -> Callable[[], AbstractContextManager[object]]:
        """Where a forward keeps what its backward needs."""
        if not microbatch.offload:
            return nullcontext
        return partial(save_on_cpu, pin_memory=self._device.type == "cuda")

    def _rows(self, microbatch: Microbatch) -> PackedRows:
        positions = [torch.arange(length, device=self._device) for length in microbatch.lengths]
        return PackedRows(
            torch.cat(positions),
            PackedSegments(microbatch.lengths),
            torch.tensor(microbatch.label_rows, device=self._device),
            torch.tensor(microbatch.labels, device=self._device),
        )


def _loss(microbatch: Microbatch, reference_N: Tensor | None, logprobs_R: Tensor) -> Tensor:
    """The microbatch's share [] of the batch's loss, from its labels' log-probabilities."""
    if microbatch.beta is None:
        return -logprobs_R.sum() * microbatch.loss_weight
    assert reference_N is not None, "the reference comes first"
    answers_N = answer_logprobs(logprobs_R, microbatch)
    return preference_loss(answers_N, reference_N, microbatch.beta) * microbatch.loss_weight


def _saving_nothing() -> AbstractContextManager[object]:
    """For a forward whose graphs no backward uses."""

    def refuse(_: None) -> Never:
        raise AssertionError("a graph that has kept nothing is never used")

    return saved_tensors_hooks(lambda tensor: None, refuse)
