"""All stages of one node in this process, each a real TorchExecutor, run one op at a time by the clock."""

from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TypeVar

import torch

from lemix.profiling.grid import MAX_ROWS, IterationShape
from services.stage_worker.compute.executor import Rows, SequenceChunk
from services.stage_worker.compute.torch_executor import TorchExecutor, torch_executors
from services.stage_worker.pipeline.sizes import work_of_iteration, work_of_microbatch
from services.stage_worker.settings import StageWorkerSettings
from shared.clock import Clock
from shared.messages.cluster import LinkPurpose
from shared.messages.events import OpKind
from shared.messages.inference import Sampling, SequenceStart
from shared.messages.training import Microbatch, StepOrder
from shared.profiles.times import NO_WORK, Work
from shared.tensors.ref import TensorRef

T = TypeVar("T")

ENDLESS = SequenceStart(
    sequence=0,
    task_id="profile",
    gateway="profile",
    sampling=Sampling(max_tokens=MAX_ROWS),
    num_prompt_tokens=1,
)
"""No iteration ends such a sequence."""


@dataclass(frozen=True, slots=True)
class MeasuredOp:
    """One op with the time that it took."""

    stage: int
    kind: OpKind
    work: Work
    elapsed_s: float
    peak_bytes: int | None
    """Rise of the device's allocated memory meanwhile; None: not on CUDA."""


class ProfiledPipeline:
    """Ops as the stage worker gives them to its executor; each call runs through all stages."""

    def __init__(
        self, executors: Sequence[TorchExecutor], device: str, block_size: int, clock: Clock
    ) -> None:
        self._executors = executors
        self._device = torch.device(device)
        self._block_size = block_size
        self._clock = clock
        self._batch_ids = (f"profile-{number}" for number in count())
        self._is_tied = False

    async def load(self) -> None:
        """Load all stages and link them, as stage workers of one node do. Raises what a worker would."""
        for executor in self._executors:
            facts = await executor.load()
        self._is_tied = facts.is_tied_across_stages
        for stage in range(1, len(self._executors)):
            await self._link(stage - 1, stage, "activations")
            await self._link(stage, stage - 1, "activations")
        if self._is_tied:
            await self._link(0, len(self._executors) - 1, "tied")
            await self._link(len(self._executors) - 1, 0, "tied")

    async def iteration(self, shape: IterationShape) -> list[MeasuredOp]:
        """One inference iteration. What the cache holds is of no matter to the time."""
        chunks = self._chunks(shape)
        work, measured = work_of_iteration(chunks), list[MeasuredOp]()
        rows: Rows = _tokens(shape.num_tokens)
        for stage, executor in enumerate(self._executors):
            is_last = executor is self._executors[-1]
            states = [executor.begin(ENDLESS) for _ in chunks] if is_last else []
            iteration = executor.iteration(chunks, rows, states=states)
            output, op = await self._measured(stage, "iteration", work, iteration)
            measured.append(op)
            rows = output.hidden or ()
        return measured

    async def batch(self, lengths: tuple[int, ...]) -> list[MeasuredOp]:
        """A training batch of one microbatch; its learning rate is 0."""
        microbatch = _microbatch(next(self._batch_ids), lengths)
        forwards, gradient = await self._forwards(microbatch)
        backwards = await self._backwards(microbatch, gradient)
        return [*forwards, *backwards, *await self._steps(microbatch.batch_id)]

    async def _forwards(self, microbatch: Microbatch) -> tuple[list[MeasuredOp], TensorRef | None]:
        work, measured = work_of_microbatch(microbatch), list[MeasuredOp]()
        rows: Rows = _tokens(work.num_tokens)
        for stage, executor in enumerate(self._executors):
            output, op = await self._measured(stage, "forward", work, executor.forward(microbatch, rows))
            measured.append(op)
            rows = output.hidden or ()
        return measured, output.gradient

    async def _backwards(self, microbatch: Microbatch, gradient: TensorRef | None) -> list[MeasuredOp]:
        work, measured = work_of_microbatch(microbatch), list[MeasuredOp]()
        for stage in reversed(range(len(self._executors) - 1)):
            assert gradient is not None, "every stage but the first sends a gradient"
            backward = self._executors[stage].backward(microbatch.batch_id, microbatch.index, gradient)
            output, op = await self._measured(stage, "backward", work, backward)
            measured.append(op)
            gradient = output.gradient
        return measured

    async def _steps(self, batch_id: str) -> list[MeasuredOp]:
        gathered = [await executor.finish_batch(batch_id) for executor in self._executors]
        measured = list[MeasuredOp]()
        order = StepOrder(fence=1, batch_id=batch_id, version=1, learning_rate=0.0)
        for stage, (executor, tied) in enumerate(zip(self._executors, reversed(gathered), strict=True)):
            await executor.measure(batch_id, tied)
            _, op = await self._measured(stage, "step", NO_WORK, executor.step(order))
            measured.append(op)
        return measured

    async def _measured(
        self, stage: int, kind: OpKind, work: Work, running: Awaitable[T]
    ) -> tuple[T, MeasuredOp]:
        """Until the device is done with it: on CUDA calls return before."""
        is_cuda = self._device.type == "cuda"
        if is_cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        before_bytes = torch.cuda.memory_allocated(self._device) if is_cuda else 0
        start_s = self._clock.now_s()
        result = await running
        if is_cuda:
            torch.cuda.synchronize(self._device)
        elapsed_s = self._clock.now_s() - start_s
        peak_bytes = torch.cuda.max_memory_allocated(self._device) - before_bytes if is_cuda else None
        return result, MeasuredOp(stage, kind, work, elapsed_s, peak_bytes)

    async def _link(self, sender: int, receiver: int, purpose: LinkPurpose) -> None:
        offer = await self._executors[sender].offer(receiver, f"profile-{receiver}", purpose)
        answer = await self._executors[receiver].accept(offer)
        await self._executors[sender].connect(receiver, purpose, answer)

    def _chunks(self, shape: IterationShape) -> list[SequenceChunk]:
        """Each sequence has blocks of its own."""
        chunks, first_free = list[SequenceChunk](), 0
        for number, (start, num_tokens) in enumerate(shape.chunks):
            num_blocks = -(-(start + num_tokens) // self._block_size)
            chunks.append(
                SequenceChunk(
                    task_id=str(number),
                    start=start,
                    num_tokens=num_tokens,
                    blocks=tuple(range(first_free, first_free + num_blocks)),
                    produces=True,
                )
            )
            first_free += num_blocks
        return chunks


@asynccontextmanager
async def profiled_pipeline(
    *, model: str, num_stages: int, device: str, kv_tokens: int, folder: Path, clock: Clock
) -> AsyncIterator[ProfiledPipeline]:
    """Executors with the stage worker's own settings; `folder` takes their shared memory."""
    settings = [
        StageWorkerSettings(
            node=0,
            stage=stage,
            num_stages=num_stages,
            model=model,
            device=device,
            kv_tokens=kv_tokens,
            max_iteration_tokens=MAX_ROWS,
            max_microbatch_tokens=MAX_ROWS,
            run_dir=folder,
            shm_dir=folder,
        )
        for stage in range(num_stages)
    ]
    make_executor = torch_executors()  # which hand tensors over as those of one worker do
    executors = [make_executor(own, f"profile-{own.stage}") for own in settings]
    pipeline = ProfiledPipeline(executors, device, settings[0].kv_block_size, clock)
    try:
        await pipeline.load()
        yield pipeline
    finally:
        for executor in executors:
            await executor.close()


def _tokens(num_tokens: int) -> tuple[int, ...]:
    return (0,) * num_tokens


def _microbatch(batch_id: str, lengths: tuple[int, ...]) -> Microbatch:
    """Every token but each example's first is a label."""
    firsts = [sum(lengths[:place]) for place in range(len(lengths))]
    ranges = [range(first, first + length - 1) for first, length in zip(firsts, lengths, strict=True)]
    label_rows = tuple(row for rows in ranges for row in rows)
    return Microbatch(
        fence=1,
        batch_id=batch_id,
        index=0,
        count=1,
        lengths=lengths,
        label_rows=label_rows,
        labels=_tokens(len(label_rows)),
        loss_weight=1 / len(label_rows),
    )
