"""Loads a stage of a model, and everything that computes with it."""

import gc
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from services.stage_worker.checkpoint import shard_files as files
from services.stage_worker.compute.executor import ModelFacts
from services.stage_worker.compute.graphs import Capture
from services.stage_worker.compute.iterations import IterationRunner
from services.stage_worker.compute.kv_cache import PagedKVCache
from services.stage_worker.compute.memory import device_memory, num_kv_blocks
from services.stage_worker.compute.model_source import ModelSource
from services.stage_worker.compute.op_timer import timer_for
from services.stage_worker.compute.stage_compute import LoadedModel, name_of_dtype, read_optimizer_state
from services.stage_worker.compute.streams import Streams
from services.stage_worker.compute.tokens import TokenRunner
from services.stage_worker.compute.weights import StageWeights
from services.stage_worker.settings import OF_TRAINING, StageWorkerSettings
from services.stage_worker.training.microbatches import MicrobatchRunner
from services.stage_worker.training.optimizers import OptimizerSettings
from services.stage_worker.training.outer import without_outer
from services.stage_worker.training.precision import chosen_dtype
from services.stage_worker.training.preferences import Reference
from services.stage_worker.training.replica import Replica
from shared import checkpoints
from shared.checkpoints import Checkpoint
from shared.model.fast_inference import enable_fast_inference
from shared.model.loader import read_config
from shared.model.lora import read_adapter
from shared.model.stage import Stage
from shared.slices import NumSlices


def load_model(
    settings: StageWorkerSettings,
    source: ModelSource,
    device: torch.device,
    *,
    capture: Capture | None,
    streams: Streams,
) -> tuple[LoadedModel, ModelFacts]:
    """Load the checkpoint that serves, or the model as it is published. In the compute thread.

    `capture`: makes static decode steps, before any training takes memory; None: there are none.
    """
    with streams.changing():
        loaded, facts = _load(settings, source, device, in_place=capture is not None)
    with streams.serving():
        loaded.iterations.warm_up()
        if capture is not None:
            loaded.iterations.use_steps(capture)
    gc.collect()
    gc.freeze()  # what is loaded stays: collections under load need not look at it
    return loaded, replace(facts, num_rows_ahead=int(loaded.iterations.goes_ahead))


def _load(
    settings: StageWorkerSettings, source: ModelSource, device: torch.device, *, in_place: bool
) -> tuple[LoadedModel, ModelFacts]:
    durable = source.serving_checkpoint()
    if durable:
        checkpoints.check_adapter(durable, source.adapter_kind)
    stage, saved = source.stage(durable), checkpoints.as_saved(durable)
    dtype = chosen_dtype(settings.dtype, read_config(source.base), device)
    chosen = {"dtype": name_of_dtype(dtype)}
    if durable:
        checkpoints.warn_of_other_settings(durable, settings.as_text(OF_TRAINING) | chosen)
    weights = StageWeights(
        stage,
        _optimizer(settings),
        version=saved.version,
        stashing=settings.stashing,
        dtype=dtype,
        in_place=in_place,
    )
    cache = _cache(stage, settings, dtype, device)
    loaded = _around(stage, weights, cache, durable, settings, source, device, dtype)
    facts = ModelFacts(
        is_tied_across_stages=stage.tied_across_stages is not None,
        weights=saved,
        vocab_size=stage.vocab_size,
        context_length=_context_length(stage),
        num_kv_blocks=cache.dummy_block,
        settings=chosen,
        num_slices=_num_slices(loaded),
    )
    return loaded, facts


def _num_slices(loaded: LoadedModel) -> NumSlices:
    count = loaded.microbatches.num_slices
    return NumSlices(count, count if loaded.weights.serve_copies else 1)


def _around(
    stage: Stage,
    weights: StageWeights,
    cache: PagedKVCache,
    durable: Checkpoint | None,
    settings: StageWorkerSettings,
    source: ModelSource,
    device: torch.device,
    dtype: torch.dtype,
) -> LoadedModel:
    """Everything that computes with the stage; training goes on where the checkpoint left it."""
    random_at_first = files.random_state(device)
    state = read_optimizer_state(durable.folder, stage) if durable else {}
    if durable:
        files.set_random_state(files.read_random_state(durable.folder, stage.layers), device)
        trained = read_adapter(stage, durable.folder) if source.adapter_kind else weights.master_tensors()
        weights.load(trained, without_outer(state), version=weights.version)
    iterations = IterationRunner(stage, cache, weights, dtype)
    microbatches = MicrobatchRunner(
        stage,
        weights,
        device,
        reference=Reference(partial(_tensors_before_training, stage, source, device, dtype)),
        num_slices=1 if device.type == "cuda" else settings.num_slices(stage.layers.num_layers),
        checkpointing=settings.activation_checkpointing,
    )
    packed = enable_fast_inference(stage)
    packed.prepare()
    return LoadedModel(
        stage=stage,
        dtype=dtype,
        iterations=iterations,
        tokens=TokenRunner(iterations, block_size=settings.kv_block_size, timer=timer_for(device)),
        weights=weights,
        microbatches=microbatches,
        replica=Replica(weights, device, state, is_outer=settings.merge == "outer"),
        packed=packed,
        random_at_first=random_at_first,
    )


def _tensors_before_training(
    stage: Stage, source: ModelSource, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """As the stage computes with them."""
    given = source.trainable_tensors(stage, None)
    return {name: tensor.detach().to(device, dtype) for name, tensor in given.items()}


def _optimizer(settings: StageWorkerSettings) -> OptimizerSettings:
    return OptimizerSettings(
        name=settings.optimizer,
        beta1=settings.optimizer_beta1,
        beta2=settings.optimizer_beta2,
        epsilon=settings.optimizer_epsilon,
        weight_decay=settings.weight_decay,
    )


def _cache(
    stage: Stage, settings: StageWorkerSettings, dtype: torch.dtype, device: torch.device
) -> PagedKVCache:
    config = stage.config
    num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    slot_bytes = 2 * num_kv_heads * head_dim * dtype.itemsize * stage.layers.num_layers
    num_blocks = num_kv_blocks(
        settings,
        stage,
        dtype,
        block_bytes=slot_bytes * settings.kv_block_size,
        memory=device_memory(device),
    )
    return PagedKVCache(
        stage.layers.num_layers,
        num_blocks,
        settings.kv_block_size,
        num_kv_heads,
        head_dim,
        dtype=dtype,
        device=settings.device,
    )


def _context_length(stage: Stage) -> int | None:
    names = ("max_position_embeddings", "n_positions")
    return next((value for name in names if (value := getattr(stage.config, name, None))), None)
