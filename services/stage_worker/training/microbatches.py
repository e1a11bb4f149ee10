"""Training on one stage: forwards that keep their graphs, backwards that use them up."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from services.stage_worker.compute.weights import StageWeights, WeightsVersion
from services.stage_worker.training.preferences import Reference, answer_logprobs, preference_loss
from shared.errors import LemixError
from shared.messages.training import Microbatch
from shared.model.attention import PackedSegments
from shared.model.stage import Stage


@dataclass(slots=True)
class _InFlight:
    """A microbatch between its forward and its backward on this stage."""

    inputs: Tensor
    outputs: Tensor
    """Activations [T, H], or on the last stage the loss."""
    version: WeightsVersion


class MicrobatchRunner:
    """Runs microbatches of one stage. All methods belong to the compute thread.

    With `checkpointing` only a microbatch's inputs are kept until its backward, which runs the forward again,
    with the weights of the first time. Not where the backward follows at once: nothing waits there.

    Shape letters: T rows of the microbatch, H hidden size, N sequences.
    """

    def __init__(
        self,
        stage: Stage,
        weights: StageWeights,
        device: torch.device,
        *,
        reference: Reference,
        checkpointing: bool = False,
    ) -> None:
        self._stage = stage
        self._weights = weights
        self._reference = reference
        self._device = device
        self._checkpointing = checkpointing
        self._in_flight: dict[tuple[str, int], _InFlight] = {}

    def drop_all(self) -> None:
        """Forget everything in flight."""
        self._in_flight.clear()
        self._weights.drop_training()
        self._reference.drop()

    def reference(self, microbatch: Microbatch, inputs: Tensor) -> Tensor:
        """Run preferences through the model as it was given; no backward follows.

        Returns activations [T, H], or on the last stage the log-probabilities [N] of the answers. They come
        of the same operations as those of the weights that train, so they differ only as the weights do.
        """
        with self._weights.installed(self._reference.version):
            if self._stage.layers.is_last:
                return self._answer_logprobs(microbatch, inputs)
            return self._run(microbatch, inputs, None)

    def forward(
        self, microbatch: Microbatch, inputs: Tensor, reference_N: Tensor | None = None
    ) -> tuple[int, Tensor]:
        """Returns the weights version, and activations [T, H], or on the last stage the loss [].

        The loss is the microbatch's share of the batch's mean over labels, in nats, or over preferences: then
        the last stage needs what `reference` gives.
        """
        inputs = self._as_leaf(inputs)
        with self._weights.training_forward() as version, self._saving(microbatch):
            if self._checkpointing and (microbatch.backward_after_all or not self._stage.layers.is_last):
                outputs = self._checkpointed(microbatch, inputs, reference_N, version)
            else:
                outputs = self._outputs(microbatch, inputs, reference_N)
        self._in_flight[microbatch.batch_id, microbatch.index] = _InFlight(inputs, outputs, version)
        return version.number, outputs.detach()

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

    def backward(self, batch_id: str, index: int, gradient: Tensor | None) -> Tensor | None:
        """Backward with the gradient [T, H] of the activations, None of the loss on the last stage.

        Returns the gradient [T, H] of the inputs, None at stage 0.

        Raises LemixError when the microbatch is not in flight here.
        """
        microbatch = self._in_flight.pop((batch_id, index), None)
        if microbatch is None:
            raise LemixError(
                f"gradient for microbatch {index} of {batch_id}, which is not in flight on this stage"
            )
        torch.autograd.backward(microbatch.outputs, gradient)
        self._weights.backward_done(microbatch.version)
        return microbatch.inputs.grad

    def _checkpointed(
        self, microbatch: Microbatch, inputs: Tensor, reference_N: Tensor | None, version: WeightsVersion
    ) -> Tensor:
        """The outputs; what their backward needs is computed when it comes."""

        def run(inputs: Tensor) -> Tensor:
            with self._weights.installed(version):
                return self._outputs(microbatch, inputs, reference_N)

        outputs: Tensor = checkpoint(run, inputs, use_reentrant=False, preserve_rng_state=False)
        return outputs

    def _outputs(self, microbatch: Microbatch, inputs: Tensor, reference_N: Tensor | None) -> Tensor:
        if not self._stage.layers.is_last:
            return self._run(microbatch, inputs, None)
        return self._loss(microbatch, inputs, reference_N) * microbatch.loss_weight

    def _loss(self, microbatch: Microbatch, inputs: Tensor, reference_N: Tensor | None) -> Tensor:
        """The sum [] over labels, or over preferences."""
        if microbatch.beta is not None:
            assert reference_N is not None, "the reference comes first"
            answers_N = self._answer_logprobs(microbatch, inputs)
            return preference_loss(answers_N, reference_N, microbatch.beta)
        labels = torch.tensor(microbatch.labels, device=self._device)
        logits = self._label_logits(microbatch, inputs)
        return functional.cross_entropy(logits.float(), labels, reduction="sum")

    def _answer_logprobs(self, microbatch: Microbatch, inputs: Tensor) -> Tensor:
        return answer_logprobs(self._label_logits(microbatch, inputs), microbatch)

    def _label_logits(self, microbatch: Microbatch, inputs: Tensor) -> Tensor:
        """The logits of the rows that have a label."""
        rows = torch.tensor(microbatch.label_rows, device=self._device)
        return self._run(microbatch, inputs, rows)

    def _as_leaf(self, inputs: Tensor) -> Tensor:
        return inputs.requires_grad_() if inputs.is_floating_point() else inputs

    def _saving(self, microbatch: Microbatch) -> AbstractContextManager[object]:
        """Where a forward keeps what its backward needs."""
        if not microbatch.offload:
            return nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=self._device.type == "cuda")

    def _run(self, microbatch: Microbatch, inputs: Tensor, logit_rows: Tensor | None) -> Tensor:
        positions = torch.cat([torch.arange(length, device=self._device) for length in microbatch.lengths])
        return self._stage.forward(inputs, positions, PackedSegments(microbatch.lengths), logit_rows)
