"""Training in slices with iterations between them: neither side sees the other."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from torch import Tensor

from services.stage_worker.compute.executor import GiveWay, IterationOutput, SequenceChunk, go_on
from services.stage_worker.compute.torch_executor import TorchExecutor
from services.stage_worker.settings import StageWorkerSettings
from shared.messages.inference import Sampling, SequenceStart
from shared.messages.training import MicrobatchForward, StepOrder
from shared.slices import WHOLE, NumSlices
from tests.support.models import NUM_LAYERS, save_tiny_model
from tests.support.preferences import preference_messages, random_pairs
from tests.support.training import BFLOAT16, LORA, messages, random_batches, settings_id

START = SequenceStart(
    sequence=0,
    task_id="t",
    gateway="g",
    sampling=Sampling(max_tokens=9, temperature=1.0, seed=5, num_logprobs=3),
    num_prompt_tokens=4,
)
PROMPT = SequenceChunk("t", 0, 4, (0,), produces=True)
RECOMPUTED = {"activation_checkpointing": True}
AFTER_ALL = {"backward_after_all": True}
OFFLOADED = {"offload": True}


async def loaded(folder: Path, discipline: str, settings: dict[str, Any]) -> TorchExecutor:
    """A stage whose passes are cut by `slo_first` and whole by `fifo`."""
    given = StageWorkerSettings(
        node=0,
        stage=0,
        num_stages=1,
        model=str(folder / "model"),
        run_dir=folder,
        shm_dir=folder,
        discipline=discipline,
        **settings,
    )
    executor = TorchExecutor(given, discipline)
    facts = await executor.load()
    serves_copies = settings.get("dtype") == "bfloat16"
    cut = NumSlices(NUM_LAYERS + 1, NUM_LAYERS + 1 if serves_copies else 1)
    assert facts.num_slices == (WHOLE if discipline == "fifo" else cut)
    return executor


async def iteration(executor: TorchExecutor, version: int | None) -> IterationOutput:
    """A prompt, whose next token is drawn."""
    return await executor.iteration([PROMPT], (1, 2, 3, 4), version, [executor.begin(START)])


@dataclass
class Between:
    """Gives way to an iteration of the newest weights, and then to one of version 0."""

    executor: TorchExecutor
    seen: list[tuple[IterationOutput, IterationOutput]] = field(default_factory=list)

    async def __call__(self) -> None:
        self.seen.append((await iteration(self.executor, None), await iteration(self.executor, 0)))


async def trained(
    executor: TorchExecutor, batch: list[MicrobatchForward], give_way: GiveWay
) -> tuple[list[float], dict[str, Tensor]]:
    """The losses and gradients of a batch."""
    batch_id, losses = batch[0].microbatch.batch_id, []
    for fed in batch:
        output = await executor.forward(fed.microbatch, fed.tokens, None, give_way)
        assert output.loss is not None
        losses.append(output.loss)
        if fed.microbatch.backward_after_all:
            await executor.backward(batch_id, fed.microbatch.index, None, give_way)
    await executor.finish_batch(batch_id)
    found = executor._compute.loaded.weights.gradients(batch_id)
    return losses, {name: gradient.clone() for name, gradient in found.items()}


async def stepped(executor: TorchExecutor, batch: list[MicrobatchForward]) -> None:
    """Keep version 0, and go on to version 1."""
    await executor.keep()
    await trained(executor, batch, go_on)
    batch_id = batch[0].microbatch.batch_id
    await executor.measure(batch_id, None)
    await executor.step(StepOrder(fence=1, batch_id=batch_id, version=1, learning_rate=0.1))


@pytest.mark.parametrize(
    ("family", "settings", "changes"),
    [
        ("llama", {}, {}),
        ("llama_tied", {}, {}),
        ("gpt2", {}, AFTER_ALL),
        ("gpt_neox", {}, {}),
        ("mistral", BFLOAT16, {}),
        ("qwen2", LORA, {}),
        ("llama_tied", RECOMPUTED, AFTER_ALL),
        ("llama", {}, OFFLOADED),
        ("llama", BFLOAT16 | LORA | RECOMPUTED, AFTER_ALL | OFFLOADED),
    ],
    ids=settings_id,
)
@pytest.mark.parametrize("has_pairs", [False, True])
async def test_iterations_between_slices_and_training_around_them_are_what_they_are_alone(
    family: str, settings: dict[str, Any], changes: dict[str, bool], has_pairs: bool, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    save_tiny_model(family, tmp_path / "model")
    whole, sliced = [await loaded(tmp_path, each, settings) for each in ("fifo", "slo_first")]
    first, second = (messages(f"b{number}", batch) for number, batch in enumerate(random_batches(2, 2)))
    if has_pairs:
        second = preference_messages("b1", [random_pairs(1, seed=seed) for seed in (1, 2)], **changes)
    else:
        second = [
            structs.replace(fed, microbatch=structs.replace(fed.microbatch, **changes)) for fed in second
        ]
    for executor in (whole, sliced):
        await stepped(executor, first)
    alone = await iteration(whole, None), await iteration(whole, 0)
    between = Between(sliced)

    expected_losses, expected = await trained(whole, second, go_on)
    losses, gradients = await trained(sliced, second, between)

    assert losses == expected_losses
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())
    assert alone[0].results != alone[1].results
    assert all(each == alone for each in between.seen)
    num_passes = 2 + has_pairs + ("activation_checkpointing" in settings)
    pauses = num_passes * NUM_LAYERS + num_passes - 1 - ("backward_after_all" in changes)
    assert len(between.seen) == len(second) * pauses

    between.seen.clear()
    for executor, give_way in ((whole, go_on), (sliced, between)):
        await executor.measure("b1", None)
        await executor.step(StepOrder(fence=1, batch_id="b1", version=2, learning_rate=0.1), give_way)
    learnt, others = (each._compute.loaded.weights.master_tensors() for each in (sliced, whole))
    assert all(torch.equal(learnt[name], master) for name, master in others.items())
    assert all(each == alone for each in between.seen)
    assert bool(between.seen) == (settings.get("dtype") == "bfloat16")
    assert (await iteration(sliced, None)) == (await iteration(whole, None)) != alone[0]
    for executor in (whole, sliced):
        await executor.close()


async def test_an_op_that_fails_in_a_later_slice_leaves_the_newest_weights(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path / "model")
    executor = await loaded(tmp_path, "slo_first", {})
    (fed,) = messages("b0", random_batches(1, 1)[0])
    alone = await iteration(executor, None)
    pauses = iter(range(2))

    async def break_later() -> None:
        if next(pauses) == 1:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await executor.forward(fed.microbatch, fed.tokens, None, break_later)
    assert await iteration(executor, None) == alone
    await executor.close()
