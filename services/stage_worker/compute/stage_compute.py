"""One loaded stage: what its executor has it compute.

Shape letters: T rows, H hidden size, R rows of logits, V vocabulary.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from services.stage_worker.checkpoint import shard_files as files
from services.stage_worker.checkpoint.staging import StateCopies
from services.stage_worker.compute.executor import (
    ForwardOutput,
    IterationOutput,
    Rows,
    ScoreOutput,
    SequenceChunk,
)
from services.stage_worker.compute.handoff import Handoff
from services.stage_worker.compute.iterations import Inputs, IterationRunner
from services.stage_worker.compute.model_source import ModelSource
from services.stage_worker.compute.op_timer import OpTimer
from services.stage_worker.compute.sampling.sequences import SequenceState
from services.stage_worker.compute.slices import Slices
from services.stage_worker.compute.streams import Streams
from services.stage_worker.compute.tokens import Asked, TokenRunner
from services.stage_worker.compute.weights import StageWeights
from services.stage_worker.settings import StageWorkerSettings
from services.stage_worker.training.microbatches import MicrobatchRunner
from services.stage_worker.training.outer import without_outer
from services.stage_worker.training.replica import Copied, Replica
from shared import checkpoints
from shared.checkpoints import Checkpoint
from shared.errors import LemixError
from shared.messages.training import Microbatch, StepOrder
from shared.model.fast_inference import InferenceWeights
from shared.model.loader import in_published_names
from shared.model.lora import adapter_config, in_adapter_names
from shared.model.stage import Stage
from shared.tensors.ref import TensorRef


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """The objects that exist once the model is loaded."""

    stage: Stage
    dtype: torch.dtype
    """The dtype of weights, activations and KV cache."""
    iterations: IterationRunner
    tokens: TokenRunner
    weights: StageWeights
    microbatches: MicrobatchRunner
    replica: Replica
    packed: InferenceWeights
    random_at_first: files.Tensors
    """The random generators before any training."""


class Forwarded(NamedTuple):
    """A microbatch's forward as it was launched."""

    output: ForwardOutput
    """Without the loss."""
    loss: Tensor | None = None
    """At the last stage, on the host: a scalar, to be read once the device has done the op."""


def name_of_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_optimizer_state(folder: Path, stage: Stage) -> dict[str, Tensor]:
    """The optimizer's state of the stage at that checkpoint."""
    return files.read_optimizer_state(folder, set(stage.trainable_tensors()))


class StageCompute:
    """All methods belong to the compute thread; those of `Executor` say what each does."""

    def __init__(
        self,
        loaded: LoadedModel,
        settings: StageWorkerSettings,
        *,
        device: torch.device,
        source: ModelSource,
        handoff: Handoff,
        copies: StateCopies,
        streams: Streams,
        timer: OpTimer,
    ) -> None:
        self.loaded = loaded
        self._settings = settings
        self._device = device
        self._source = source
        self._handoff = handoff
        self._copies = copies
        self._streams = streams
        self._timer = timer
        self._served: int | None = None
        """The weights version of the last iteration, when it was a kept one."""

    def iteration(
        self,
        chunks: Sequence[SequenceChunk],
        rows: Rows,
        version: int | None,
        states: Sequence[SequenceState],
    ) -> IterationOutput:
        loaded, layers = self.loaded, self.loaded.stage.layers
        with self._streams.serving():
            inputs = self._inputs(rows, sum(chunk.num_tokens for chunk in chunks))
            self._served = version
            if layers.is_last:
                (results, failed), took = loaded.tokens.run(Asked(chunks, states, inputs), version)
                return IterationOutput(None, results, failed, took)
            end = self._timer()
            outputs = loaded.iterations.run(chunks, inputs, (), version)
            return IterationOutput(self._handoff.put(layers.stage + 1, outputs), took=end())

    def forward(self, microbatch: Microbatch, rows: Rows, reference: TensorRef | None) -> Slices[Forwarded]:
        loaded, layers = self.loaded, self.loaded.stage.layers
        inputs, given = self._both(rows, reference, sum(microbatch.lengths))
        self._check_tokens(microbatch.labels)
        of_reference = None
        if microbatch.beta is not None:
            of_reference = yield from loaded.microbatches.reference(microbatch, given)
            yield
        version, outputs = yield from loaded.microbatches.forward(microbatch, inputs, of_reference)
        if not layers.is_last:
            if of_reference is None:
                return Forwarded(ForwardOutput(version, hidden=self._handoff.put(layers.stage + 1, outputs)))
            hidden, with_it = self._handoff.put_both(layers.stage + 1, outputs, of_reference)
            return Forwarded(ForwardOutput(version, hidden=hidden, reference=with_it))
        gradient = None
        if not microbatch.backward_after_all:
            yield
            gradient = yield from self.backward(microbatch.batch_id, microbatch.index, None)
        loss = outputs.to("cpu", non_blocking=True)
        return Forwarded(ForwardOutput(version, gradient=gradient), loss)

    def backward(self, batch_id: str, index: int, gradient: TensorRef | None) -> Slices[TensorRef | None]:
        of_outputs = None if gradient is None else self._handoff.receive(gradient)
        of_inputs = yield from self.loaded.microbatches.backward(batch_id, index, of_outputs)
        if of_inputs is None:
            return None
        return self._handoff.put(self._settings.stage - 1, of_inputs)

    def score(self, tokens: Sequence[int], hidden: TensorRef | None) -> ScoreOutput:
        loaded, layers = self.loaded, self.loaded.stage.layers
        self._check_tokens(tokens)
        outputs = loaded.microbatches.score(tokens, self._as_tensor(hidden or tokens, len(tokens)))
        if not layers.is_last:
            return ScoreOutput(hidden=self._handoff.put(layers.stage + 1, outputs))
        return ScoreOutput(logprobs=tuple(outputs.tolist()), dtype=name_of_dtype(self.loaded.dtype))

    def finish_batch(self, batch_id: str) -> TensorRef | None:
        gradients, layers = self.loaded.weights.finish_batch(batch_id), self.loaded.stage.layers
        tied = self.loaded.stage.tied_across_stages
        if tied is None:
            return None
        other_end = layers.num_stages - 1 if layers.is_first else 0
        return self._handoff.put(other_end, gradients[tied], "tied")

    def measure(self, batch_id: str, tied: TensorRef | None) -> float:
        weights, stage = self.loaded.weights, self.loaded.stage
        if tied is not None:
            assert stage.tied_across_stages is not None
            weights.add_gradient(batch_id, stage.tied_across_stages, self._handoff.receive(tied))
        return self._squared_norm(batch_id)

    def step(self, order: StepOrder) -> Slices[None]:
        """In slices where the weights that serve change only at the end."""
        weights = self.loaded.weights
        if order.skip:
            weights.skip(order.batch_id)
            return
        self._copies.settle()
        batch_id, learning_rate, scale = order.batch_id, order.learning_rate, order.gradient_scale
        if weights.serve_copies:
            num_slices = self.loaded.microbatches.num_slices
            yield from weights.learn(batch_id, learning_rate, scale=scale, num_slices=num_slices)
            yield
            with self._streams.changing():
                weights.show(order.version)
        else:
            with self._streams.changing():
                weights.step(batch_id, learning_rate, scale=scale, version=order.version)
        self._note_new_weights()

    def keep(self) -> bool:
        weights, packed = self.loaded.weights, self.loaded.packed
        with self._streams.changing(), packed.moving_to(weights.serving(weights.version)):
            return weights.keep()

    def release(self, version: int) -> None:
        with self._streams.changing():
            self.loaded.weights.release(version)

    def adopt_state(self, mean: Copied, version: int) -> None:
        self._copies.settle()
        with self._streams.changing():
            self.loaded.replica.adopt_state(mean, version=version)
        self._note_new_weights()

    def adopt_gradients(self, mean: Copied, batch_id: str) -> float:
        self.loaded.replica.adopt_gradients(mean, batch_id)
        return self._squared_norm(batch_id)

    def restore(self, checkpoint: str, version: int) -> None:
        loaded, folder = self.loaded, Path(checkpoint) if checkpoint else None
        self._copies.settle()
        loaded.microbatches.drop_all()
        self._served = None  # what is packed goes stale, whichever version it is of
        if folder and (manifest := checkpoints.read(folder)):
            found = Checkpoint(manifest, folder)
            checkpoints.check_model(found, self._settings.model)
            checkpoints.check_adapter(found, self._source.adapter_kind)
        state = read_optimizer_state(folder, loaded.stage) if folder else {}
        with self._streams.changing():
            loaded.weights.load(
                self._source.trainable_tensors(loaded.stage, folder), without_outer(state), version=version
            )
        loaded.replica.restored(state)
        random = files.read_random_state(folder, loaded.stage.layers) if folder else loaded.random_at_first
        files.set_random_state(random, self._device)
        self._note_new_weights()

    def snapshot(self) -> Future[files.Snapshot]:
        """Tensors are copied while other calls go on, but for those that change the weights."""
        stage, weights = self.loaded.stage, self.loaded.weights
        masters = weights.master_tensors()
        optimizer = weights.optimizer_state() | self.loaded.replica.named_state()
        optimizer |= files.random_state(self._device)
        if self._source.adapter_kind:
            config, published = adapter_config(stage, self._settings.model), in_adapter_names(masters)
        else:
            config, published = None, in_published_names(stage, masters)
        published = {name: tensor.contiguous() for name, tensor in published.items()}
        return self._copies.start(partial(files.take_snapshot, published, optimizer, lora=config))

    def _inputs(self, rows: Rows, num_rows: int) -> Inputs:
        """Raises CarrierError when activations are not there, or not those of `num_rows`; LemixError when
        tokens are none of the model's.
        """
        if not isinstance(rows, TensorRef):
            self._check_tokens(rows)
            return rows
        return self._handoff.receive_rows(rows, num_rows, self.loaded.stage.hidden_size)

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        """Raises LemixError: what lies outside the vocabulary would leave a GPU beyond repair."""
        vocab_size = self.loaded.stage.vocab_size
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
            raise LemixError(f"tokens {min(tokens)} to {max(tokens)} are not all in 0..{vocab_size - 1}")

    def _as_tensor(self, rows: Rows, num_rows: int) -> Tensor:
        inputs = self._inputs(rows, num_rows)
        if isinstance(inputs, Tensor):
            return inputs
        return torch.tensor(inputs, dtype=torch.int64, device=self._device)

    def _both(self, rows: Rows, reference: TensorRef | None, num_rows: int) -> tuple[Tensor, Tensor]:
        """Inputs for the weights that train and for the reference: the same where none is given. Raises as
        `_inputs`; then neither tensor keeps its room.
        """
        try:
            inputs = self._as_tensor(rows, num_rows)
        except Exception:
            if reference is not None:
                self._handoff.discard(reference)
            raise
        return inputs, inputs if reference is None else self._as_tensor(reference, num_rows)

    def _squared_norm(self, batch_id: str) -> float:
        stage = self.loaded.stage
        counted_elsewhere = None if stage.layers.is_first else stage.tied_across_stages
        return self.loaded.weights.squared_norm(batch_id, but=counted_elsewhere)

    def _note_new_weights(self) -> None:
        """Note that packed weights are stale, unless they are the base of an adapter, or a kept version."""
        self.loaded.tokens.forget()
        if not self._source.adapter_kind and self._served is None:
            self.loaded.packed.invalidate()
