"""The executor that computes: one stage of a Hugging Face model, in one thread of its own.

Shape letters: T rows, H hidden size, R rows of logits, V vocabulary.
"""

import asyncio
import gc
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from services.stage_worker.checkpoint import shard_files as files
from services.stage_worker.checkpoint.staging import CpuLane, CudaLane, StateCopies
from services.stage_worker.compute.end_of_work import Wait, end_mark_for
from services.stage_worker.compute.executor import (
    ForwardOutput,
    IterationOutput,
    ModelFacts,
    Rows,
    ScoreOutput,
    SequenceChunk,
    ShardFiles,
)
from services.stage_worker.compute.graphs import capture_for
from services.stage_worker.compute.handoff import Handoff
from services.stage_worker.compute.iterations import Inputs, IterationRunner
from services.stage_worker.compute.kv_cache import PagedKVCache
from services.stage_worker.compute.local_stages import LocalStages
from services.stage_worker.compute.memory import device_memory, num_kv_blocks
from services.stage_worker.compute.sampling.grammar import GrammarCompiler, Vocabulary
from services.stage_worker.compute.sampling.sequences import SequenceState
from services.stage_worker.compute.tokens import Asked, TokenRunner
from services.stage_worker.compute.weights import StageWeights
from services.stage_worker.settings import OF_TRAINING, StageWorkerSettings
from services.stage_worker.training.microbatches import MicrobatchRunner
from services.stage_worker.training.optimizers import OptimizerSettings
from services.stage_worker.training.outer import without_outer
from services.stage_worker.training.peers import Peers
from services.stage_worker.training.precision import chosen_dtype
from services.stage_worker.training.preferences import Reference
from services.stage_worker.training.replica import Copied, Replica
from shared import checkpoints
from shared.checkpoints import Checkpoint
from shared.errors import LemixError
from shared.messages.cluster import LinkAnswer, LinkOffer, LinkPurpose
from shared.messages.inference import SequenceStart
from shared.messages.training import AdapterKind, Microbatch, StepOrder
from shared.messages.weights import MergeGroup, OuterStep
from shared.model.fast_inference import InferenceWeights, enable_fast_inference
from shared.model.loader import in_published_names, load_stage, model_partition, read_config
from shared.model.lora import (
    LoraSettings,
    adapter_config,
    add_adapter,
    in_adapter_names,
    initial_adapter,
    read_adapter,
)
from shared.model.stage import Stage
from shared.model_files import CONFIG_FILES, WEIGHT_FILES, resolve
from shared.tensors.ref import TensorRef

P = ParamSpec("P")
T = TypeVar("T")


def torch_executors() -> Callable[[StageWorkerSettings, str], "TorchExecutor"]:
    """A maker of the executors of one process."""
    local = LocalStages()
    return lambda settings, instance: TorchExecutor(settings, instance, local)


def _context_length(stage: Stage) -> int | None:
    names = ("max_position_embeddings", "n_positions")
    return next((value for name in names if (value := getattr(stage.config, name, None))), None)


def _optimizer_state(folder: Path, stage: Stage) -> dict[str, Tensor]:
    return files.read_optimizer_state(folder, set(stage.trainable_tensors()))


@dataclass(frozen=True, slots=True)
class _Loaded:
    """The objects that exist once the model is loaded."""

    stage: Stage
    iterations: IterationRunner
    tokens: TokenRunner
    weights: StageWeights
    microbatches: MicrobatchRunner
    replica: Replica
    packed: InferenceWeights
    random_at_first: files.Tensors
    """The random generators before any training."""


class TorchExecutor:
    """Implements `Executor` on `cpu` or `cuda:N`."""

    def __init__(
        self, settings: StageWorkerSettings, instance: str, local: LocalStages | None = None
    ) -> None:
        """`local`: what the executors of this process share; None: there is no other."""
        self._settings = settings
        self._instance = instance
        self._local = local or LocalStages()
        self._device = torch.device(settings.device)
        self._capture = capture_for(self._device)
        self._mark_end = end_mark_for(self._device)
        self._dtype = torch.float32
        """Chosen when the model is loaded, where the settings leave it open."""
        self._thread = self._local.enter(instance, settings.device)
        self._peers = Peers(
            node=settings.node,
            device=self._device,
            host=settings.collective_host,
            timeout_s=settings.collective_timeout_s,
        )
        self._peers_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="peers")
        self._copies = StateCopies(CudaLane(self._device) if self._device.type == "cuda" else CpuLane())
        self._handoff = Handoff(settings, instance, self._device, self._local)
        self._grammars = GrammarCompiler(self._vocabulary)
        self._model: _Loaded | None = None
        self._served: int | None = None
        """The weights version of the last iteration, when it was a kept one."""

    async def load(self) -> ModelFacts:
        return await self._run(self._load)

    async def offer(self, peer: int, instance: str, purpose: LinkPurpose) -> LinkOffer:
        stage = self._loaded.stage
        return await self._run(
            self._handoff.offer,
            peer,
            instance,
            purpose,
            hidden_size=stage.hidden_size,
            vocab_size=stage.vocab_size,
        )

    async def connect(self, peer: int, purpose: LinkPurpose, answer: LinkAnswer) -> None:
        await self._run(self._handoff.connect, peer, purpose, answer)

    def is_link_lost(self, peer: int, purpose: LinkPurpose) -> bool:
        return self._handoff.is_lost(peer, purpose)

    async def accept(self, offer: LinkOffer) -> LinkAnswer:
        return await self._run(self._handoff.accept, offer)

    def begin(self, start: SequenceStart) -> SequenceState:
        text = start.sampling.grammar
        grammar = None if text is None else self._grammars.begin(text)
        return SequenceState(start.gateway, start.sampling, grammar, set(start.prompt))

    async def iteration(
        self,
        chunks: Sequence[SequenceChunk],
        rows: Rows,
        version: int | None = None,
        states: Sequence[SequenceState] = (),
    ) -> IterationOutput:
        return await self._run(self._iteration, chunks, rows, version, states)

    async def forward(
        self, microbatch: Microbatch, rows: Rows, reference: TensorRef | None = None
    ) -> ForwardOutput:
        return await self._run_until_done(self._forward, microbatch, rows, reference)

    async def backward(self, batch_id: str, index: int, gradient: TensorRef | None) -> TensorRef | None:
        return await self._run_until_done(self._backward, batch_id, index, gradient)

    async def score(self, tokens: Sequence[int], hidden: TensorRef | None) -> ScoreOutput:
        return await self._run(self._score, tokens, hidden)

    async def discard(self, tensor: TensorRef) -> None:
        await self._run(self._handoff.discard, tensor)

    async def finish_batch(self, batch_id: str) -> TensorRef | None:
        return await self._run(self._finish_batch, batch_id)

    async def measure(self, batch_id: str, tied: TensorRef | None) -> float:
        return await self._run(self._measure, batch_id, tied)

    async def step(self, order: StepOrder) -> None:
        await self._run_until_done(self._step, order)

    async def keep(self) -> bool:
        return await self._run(self._loaded.weights.keep)

    async def release(self, version: int) -> None:
        await self._run(self._loaded.weights.release, version)

    async def rendezvous(self) -> str:
        return await asyncio.to_thread(self._peers.rendezvous)

    async def copy_state(self) -> Copied:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._peers_thread, self._loaded.replica.copy_state)

    async def copy_gradients(self, batch_id: str) -> Copied:
        return await self._run(self._loaded.replica.copy_gradients, batch_id)

    async def average(
        self, copied: Copied, group: MergeGroup, rendezvous: str, outer: OuterStep | None = None
    ) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._peers_thread, self._average, copied, group, rendezvous, outer)

    async def hold_state(self, mean: Copied, version: int) -> None:
        await self._run(self._hold_state, mean, version)

    async def hold_gradients(self, mean: Copied, batch_id: str) -> float:
        return await self._run(self._hold_gradients, mean, batch_id)

    async def restore(self, checkpoint: str, version: int) -> None:
        await self._run(self._restore, checkpoint, version)

    async def snapshot(self) -> Future[files.Snapshot]:
        return await self._run(self._snapshot)

    async def write(self, snapshot: Future[files.Snapshot], folder: Path) -> ShardFiles:
        layers = self._loaded.stage.layers
        return await asyncio.to_thread(lambda: files.write_shard(snapshot.result(), folder, layers))

    async def close(self) -> None:
        self._handoff.close()
        self._peers.close()
        self._grammars.close()
        self._copies.close()
        self._local.leave(self._instance)
        self._peers_thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(*args, **kwargs))

    async def _run_until_done(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run it until the device has done it, too: an op's time is not that of its launch, and what decodes
        next has no more than one op ahead of it.
        """

        def launch() -> tuple[T, Wait | None]:
            return work(*args, **kwargs), self._mark_end()

        result, wait = await self._run(launch)
        if wait is not None:
            await asyncio.to_thread(wait)
        return result

    def _vocabulary(self) -> Vocabulary:
        return Vocabulary.load(self._settings.model, self._loaded.stage.vocab_size)

    @property
    def _loaded(self) -> _Loaded:
        assert self._model is not None, "load() comes first"
        return self._model

    # In the thread that waits for peers.

    def _average(self, copied: Copied, group: MergeGroup, rendezvous: str, outer: OuterStep | None) -> None:
        if len(group.members) > 1:
            self._peers.mean_(copied.tensors.flat, group, rendezvous)
        if outer is not None:
            self._loaded.replica.make_outer_step(copied, outer)

    # Below here: in the compute thread.

    def _load(self) -> ModelFacts:
        settings = self._settings
        torch.set_num_threads(settings.num_threads)
        durable = self._serving_checkpoint()
        if durable:
            checkpoints.check_adapter(durable, self._adapter_kind)
        stage, saved = self._stage(durable), checkpoints.as_saved(durable)
        self._dtype = chosen_dtype(settings.dtype, read_config(self._base), self._device)
        weights = StageWeights(
            stage,
            self._optimizer(),
            version=saved.version,
            stashing=settings.stashing,
            dtype=self._dtype,
            in_place=self._capture is not None,
        )
        at_first = files.random_state(self._device)
        state = _optimizer_state(durable.folder, stage) if durable else {}
        if durable:
            checkpoints.warn_of_other_settings(durable, settings.told(OF_TRAINING) | self._chosen_settings)
            files.set_random_state(files.read_random_state(durable.folder, stage.layers), self._device)
            trained = read_adapter(stage, durable.folder) if self._adapter_kind else weights.master_tensors()
            weights.load(trained, without_outer(state), version=weights.version)
        replica = Replica(weights, self._device, state, is_outer=settings.merge == "outer")
        cache = self._cache(stage)
        iterations = IterationRunner(stage, cache, weights, self._dtype)
        microbatches = MicrobatchRunner(
            stage,
            weights,
            self._device,
            reference=Reference(self._tensors_before_training),
            checkpointing=settings.activation_checkpointing,
        )
        packed = enable_fast_inference(stage)
        packed.prepare()
        tokens = TokenRunner(iterations, block_size=settings.kv_block_size)
        self._model = _Loaded(stage, iterations, tokens, weights, microbatches, replica, packed, at_first)
        iterations.warm_up()
        if self._capture is not None:
            iterations.use_steps(self._capture)
        gc.collect()
        gc.freeze()  # what is loaded stays: collections under load need not look at it
        return ModelFacts(
            num_rows_ahead=int(iterations.goes_ahead),
            is_tied_across_stages=stage.tied_across_stages is not None,
            weights=saved,
            vocab_size=stage.vocab_size,
            context_length=_context_length(stage),
            num_kv_blocks=cache.dummy_block,
            settings=self._chosen_settings,
        )

    def _serving_checkpoint(self) -> Checkpoint | None:
        """The checkpoint to serve until the trainer restores this stage: most likely served then, too."""
        settings, root = self._settings, self._settings.checkpoint_dir
        of_nodes = checkpoints.nodes_like(root, settings.node, merge=settings.merge)
        return checkpoints.newest_serving(root, of_nodes, model=settings.model)

    @property
    def _base(self) -> Path:
        """The model as it is published."""
        return resolve(self._settings.model, CONFIG_FILES + WEIGHT_FILES)

    @property
    def _adapter_kind(self) -> AdapterKind:
        return "lora" if self._settings.adapter == "lora" else ""

    def _stage(self, durable: Checkpoint | None) -> Stage:
        settings, base = self._settings, self._base
        folder = durable.folder if durable and not self._adapter_kind else base
        layers = model_partition(read_config(folder), settings.num_stages)[settings.stage]
        stage = load_stage(folder, layers, device=settings.device)
        if self._adapter_kind:
            add_adapter(stage, self._lora())
        return stage

    def _lora(self) -> LoraSettings:
        settings = self._settings
        targets = tuple(settings.lora_targets.split(","))
        return LoraSettings(rank=settings.lora_rank, alpha=settings.lora_alpha, targets=targets)

    def _optimizer(self) -> OptimizerSettings:
        settings = self._settings
        return OptimizerSettings(
            name=settings.optimizer,
            beta1=settings.optimizer_beta1,
            beta2=settings.optimizer_beta2,
            epsilon=settings.optimizer_epsilon,
            weight_decay=settings.weight_decay,
        )

    def _cache(self, stage: Stage) -> PagedKVCache:
        config = stage.config
        num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        slot_bytes = 2 * num_kv_heads * head_dim * self._dtype.itemsize * stage.layers.num_layers
        num_blocks = num_kv_blocks(
            self._settings,
            stage,
            self._dtype,
            block_bytes=slot_bytes * self._settings.kv_block_size,
            memory=device_memory(self._device),
        )
        return PagedKVCache(
            stage.layers.num_layers,
            num_blocks,
            self._settings.kv_block_size,
            num_kv_heads,
            head_dim,
            dtype=self._dtype,
            device=self._settings.device,
        )

    @property
    def _chosen_settings(self) -> dict[str, str]:
        return {"dtype": str(self._dtype).removeprefix("torch.")}

    def _inputs(self, rows: Rows, num_rows: int) -> Inputs:
        """Raises CarrierError when activations are not there, or not those of `num_rows`; LemixError when
        tokens are none of the model's.
        """
        if not isinstance(rows, TensorRef):
            self._check_tokens(rows)
            return rows
        return self._handoff.take_rows(rows, num_rows, self._loaded.stage.hidden_size)

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        """Raises LemixError: what lies outside the vocabulary would leave a GPU beyond repair."""
        vocab_size = self._loaded.stage.vocab_size
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
            raise LemixError(f"tokens {min(tokens)} to {max(tokens)} are not all in 0..{vocab_size - 1}")

    def _iteration(
        self,
        chunks: Sequence[SequenceChunk],
        rows: Rows,
        version: int | None,
        states: Sequence[SequenceState],
    ) -> IterationOutput:
        loaded, inputs = self._loaded, self._inputs(rows, sum(chunk.num_tokens for chunk in chunks))
        layers = loaded.stage.layers
        self._served = version
        if layers.is_last:
            return IterationOutput(None, *loaded.tokens.run(Asked(chunks, states, inputs), version))
        outputs = loaded.iterations.run(chunks, inputs, (), version)
        return IterationOutput(self._handoff.put(layers.stage + 1, outputs))

    def _forward(self, microbatch: Microbatch, rows: Rows, reference: TensorRef | None) -> ForwardOutput:
        loaded, layers = self._loaded, self._loaded.stage.layers
        inputs = self._microbatch_inputs(microbatch, rows)
        given = inputs if reference is None else self._microbatch_inputs(microbatch, reference)
        self._check_tokens(microbatch.labels)
        has_pairs = microbatch.beta is not None
        of_reference = loaded.microbatches.reference(microbatch, given) if has_pairs else None
        version, outputs = loaded.microbatches.forward(microbatch, inputs, of_reference)
        if not layers.is_last:
            sent = self._handoff.put(layers.stage + 1, outputs)
            with_it = None if of_reference is None else self._handoff.put(layers.stage + 1, of_reference)
            return ForwardOutput(version, hidden=sent, reference=with_it)
        turns = not microbatch.backward_after_all
        gradient = self._backward(microbatch.batch_id, microbatch.index, None) if turns else None
        return ForwardOutput(version, loss=outputs.item(), gradient=gradient)

    def _score(self, tokens: Sequence[int], hidden: TensorRef | None) -> ScoreOutput:
        loaded, layers = self._loaded, self._loaded.stage.layers
        self._check_tokens(tokens)
        outputs = loaded.microbatches.score(tokens, self._as_tensor(hidden or tokens, len(tokens)))
        if not layers.is_last:
            return ScoreOutput(hidden=self._handoff.put(layers.stage + 1, outputs))
        return ScoreOutput(logprobs=tuple(outputs.tolist()), dtype=self._chosen_settings["dtype"])

    def _microbatch_inputs(self, microbatch: Microbatch, rows: Rows) -> Tensor:
        return self._as_tensor(rows, sum(microbatch.lengths))

    def _as_tensor(self, rows: Rows, num_rows: int) -> Tensor:
        inputs = self._inputs(rows, num_rows)
        if isinstance(inputs, Tensor):
            return inputs
        return torch.tensor(inputs, dtype=torch.int64, device=self._device)

    def _backward(self, batch_id: str, index: int, gradient: TensorRef | None) -> TensorRef | None:
        of_outputs = None if gradient is None else self._handoff.take(gradient)
        of_inputs = self._loaded.microbatches.backward(batch_id, index, of_outputs)
        if of_inputs is None:
            return None
        return self._handoff.put(self._settings.stage - 1, of_inputs)

    def _finish_batch(self, batch_id: str) -> TensorRef | None:
        gradients, layers = self._loaded.weights.finish_batch(batch_id), self._loaded.stage.layers
        tied = self._loaded.stage.tied_across_stages
        if tied is None:
            return None
        other_end = layers.num_stages - 1 if layers.is_first else 0
        return self._handoff.put(other_end, gradients[tied], "tied")

    def _measure(self, batch_id: str, tied: TensorRef | None) -> float:
        weights, stage = self._loaded.weights, self._loaded.stage
        if tied is not None:
            assert stage.tied_across_stages is not None
            weights.add_gradient(batch_id, stage.tied_across_stages, self._handoff.take(tied))
        return self._squared_norm(batch_id)

    def _squared_norm(self, batch_id: str) -> float:
        stage = self._loaded.stage
        counted_elsewhere = None if stage.layers.is_first else stage.tied_across_stages
        return self._loaded.weights.squared_norm(batch_id, but=counted_elsewhere)

    def _step(self, order: StepOrder) -> None:
        loaded = self._loaded
        if order.skip:
            loaded.weights.skip(order.batch_id)
            return
        self._copies.settle()
        loaded.weights.step(
            order.batch_id, order.learning_rate, scale=order.gradient_scale, version=order.version
        )
        self._note_new_weights()

    def _note_new_weights(self) -> None:
        """Note that packed weights are stale, unless they are the base of an adapter, or a kept version."""
        self._loaded.tokens.forget()
        if not self._adapter_kind and self._served is None:
            self._loaded.packed.invalidate()

    def _hold_state(self, mean: Copied, version: int) -> None:
        self._copies.settle()
        self._loaded.replica.hold_state(mean, version=version)
        self._note_new_weights()

    def _hold_gradients(self, mean: Copied, batch_id: str) -> float:
        self._loaded.replica.hold_gradients(mean, batch_id)
        return self._squared_norm(batch_id)

    def _restore(self, checkpoint: str, version: int) -> None:
        loaded, folder = self._loaded, Path(checkpoint) if checkpoint else None
        self._copies.settle()
        loaded.microbatches.drop_all()
        self._served = None  # what is packed goes stale, whichever version it is of
        if folder and (manifest := checkpoints.read(folder)):
            found = Checkpoint(manifest, folder)
            checkpoints.check_model(found, self._settings.model)
            checkpoints.check_adapter(found, self._adapter_kind)
        state = _optimizer_state(folder, loaded.stage) if folder else {}
        loaded.weights.load(self._trainable_tensors(folder), without_outer(state), version=version)
        loaded.replica.restored(state)
        random = files.read_random_state(folder, loaded.stage.layers) if folder else loaded.random_at_first
        files.set_random_state(random, self._device)
        self._note_new_weights()

    def _trainable_tensors(self, checkpoint: Path | None) -> Mapping[str, Tensor]:
        """As they were at the checkpoint, or before any training."""
        stage = self._loaded.stage
        if self._adapter_kind:
            return read_adapter(stage, checkpoint) if checkpoint else initial_adapter(stage)
        folder = checkpoint or self._base
        return load_stage(folder, stage.layers, device=self._settings.device).named_tensors()

    def _tensors_before_training(self) -> dict[str, Tensor]:
        """As the stage computes with them."""
        given = self._trainable_tensors(None)
        return {name: tensor.detach().to(self._device, self._dtype) for name, tensor in given.items()}

    def _snapshot(self) -> Future[files.Snapshot]:
        """Tensors are copied while other calls go on, but for those that change the weights."""
        stage, weights = self._loaded.stage, self._loaded.weights
        masters = weights.master_tensors()
        optimizer = weights.optimizer_state() | self._loaded.replica.named_state()
        optimizer |= files.random_state(self._device)
        if self._adapter_kind:
            config, published = adapter_config(stage, self._settings.model), in_adapter_names(masters)
        else:
            config, published = None, in_published_names(stage, masters)
        published = {name: tensor.contiguous() for name, tensor in published.items()}
        return self._copies.start(partial(files.take_snapshot, published, optimizer, lora=config))
