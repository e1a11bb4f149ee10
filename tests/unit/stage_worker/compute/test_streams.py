"""What runs beside what on a GPU, with the streams and events of a card that is played."""

import random
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch

from services.stage_worker.compute import local_stages
from services.stage_worker.compute.executor import SequenceChunk
from services.stage_worker.compute.iterations import IterationRunner
from services.stage_worker.compute.streams import CudaStreams
from services.stage_worker.compute.torch_executor import TorchExecutor
from services.stage_worker.compute.weights import StageWeights
from services.stage_worker.settings import StageWorkerSettings
from services.stage_worker.training.microbatches import MicrobatchRunner
from shared.messages.inference import Sampling, SequenceStart
from shared.messages.training import StepOrder
from tests.support.models import save_tiny_model
from tests.support.played_cuda import PlayedCuda, PlayedEvent, PlayedStream
from tests.support.training import messages, random_batches

DEVICE = torch.device("cuda:0")
CHANGES = (
    (StageWeights, "step"),
    (StageWeights, "show"),
    (StageWeights, "keep"),
    (StageWeights, "release"),
    (StageWeights, "load"),
    (StageWeights, "replace"),
)
"""All that writes, or gives to others, memory that iterations read."""
OF_STREAMS = ("wait_stream", "wait_event", "record_event")
OF_EVENTS = ("record", "query", "synchronize", "elapsed_time")
START = SequenceStart(
    sequence=0,
    task_id="t",
    gateway="g",
    sampling=Sampling(max_tokens=9, temperature=0.0),
    num_prompt_tokens=2,
)


def test_iterations_have_the_higher_priority_and_do_not_wait_for_training() -> None:
    cuda = PlayedCuda()
    streams = CudaStreams(DEVICE, cuda)
    cuda.launch("microbatch", 100.0)
    with streams.serving():
        cuda.launch("iteration")
    assert cuda.done_before["iteration"] == set()
    assert cuda.priorities["iteration"] < cuda.priorities["microbatch"]


def test_a_change_runs_between_two_iterations_also_when_it_fails() -> None:
    cuda = PlayedCuda()
    streams = CudaStreams(DEVICE, cuda)
    with streams.serving():
        cuda.launch("before")
    with pytest.raises(ValueError), streams.changing():
        cuda.launch("change")
        raise ValueError
    cuda.launch("training goes on")
    with streams.serving():
        cuda.launch("after")
    assert cuda.done_before["change"] == {"before"}
    assert cuda.done_before["after"] == {"before", "change"}


@pytest.mark.parametrize(
    ("played", "real"),
    [
        (PlayedCuda.Stream, torch.cuda.Stream.__new__),
        (PlayedCuda.Event, torch.cuda.Event.__new__),
        (PlayedCuda.current_stream, torch.cuda.current_stream),
        (PlayedCuda.stream, torch.cuda.stream),
        *((getattr(PlayedStream, name), getattr(torch.cuda.Stream, name)) for name in OF_STREAMS),
        *((getattr(PlayedEvent, name), getattr(torch.cuda.Event, name)) for name in OF_EVENTS),
    ],
)
def test_the_played_card_is_called_like_the_real_one(
    played: Callable[..., Any], real: Callable[..., Any]
) -> None:
    def names(function: Callable[..., Any]) -> list[str]:
        return [name for name in signature(function).parameters if name not in ("self", "cls")]

    assert names(played) == names(real)[: len(names(played))]


class Launches:
    """Gives each call of some methods a number, and launches it on the played card."""

    def __init__(self, cuda: PlayedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cuda = cuda
        self.kinds: list[str] = []
        self._monkeypatch = monkeypatch

    def note(self, owner: type, name: str, kind: str) -> None:
        method: Callable[..., Any] = getattr(owner, name)

        def noted(*arguments: Any, **options: Any) -> Any:
            self.cuda.launch(str(len(self.kinds)))
            self.kinds.append(kind)
            return method(*arguments, **options)

        self._monkeypatch.setattr(owner, name, noted)

    def are_ordered(self, one: int, later: int) -> bool:
        return str(one) in self.cuda.done_before[str(later)]


@pytest.mark.parametrize(("seed", "dtype"), [(0, "float32"), (1, "float32"), (2, "bfloat16")])
async def test_nothing_changes_what_an_iteration_reads_while_it_runs(
    seed: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, chance = PlayedCuda(), random.Random(seed)
    launches = Launches(cuda, monkeypatch)
    for owner, name in CHANGES:
        launches.note(owner, name, "change")
    launches.note(IterationRunner, "run", "iteration")
    launches.note(MicrobatchRunner, "forward", "training")
    monkeypatch.setattr(local_stages, "streams_for", lambda device: CudaStreams(DEVICE, cuda))
    save_tiny_model("llama", tmp_path / "model")
    settings = StageWorkerSettings(
        node=0,
        stage=0,
        num_stages=1,
        model=str(tmp_path / "model"),
        run_dir=tmp_path,
        shm_dir=tmp_path,
        dtype=dtype,
    )
    executor = TorchExecutor(settings, "me")
    await executor.load()
    batches = random_batches(15, 1)

    async def train() -> None:
        batch_id = f"b{len(batches)}"
        for fed in messages(batch_id, batches.pop()):
            await executor.forward(fed.microbatch, fed.tokens)
            await iterate()
        await executor.finish_batch(batch_id)
        await executor.measure(batch_id, None)
        await executor.step(StepOrder(fence=1, batch_id=batch_id, version=7, learning_rate=0.1))

    async def iterate() -> None:
        chunk = SequenceChunk("t", 0, 2, (0,), produces=True)
        await executor.iteration([chunk], (1, 2), None, [executor.begin(START)])

    async def merge() -> None:
        await executor.adopt_state(await executor.copy_state(), 7)

    async def restore() -> None:
        await executor.restore("", 0)

    async def keep() -> None:
        await executor.keep()
        await iterate()
        for version in (0, 7):
            await executor.release(version)

    for _ in range(15):
        await chance.choice((train, iterate, iterate, merge, restore, keep))()
    await executor.close()
    kinds = launches.kinds
    pairs = [(one, later) for later in range(len(kinds)) for one in range(later)]
    of_both = [pair for pair in pairs if {kinds[each] for each in pair} == {"iteration", "change"}]
    assert len(of_both) > 50
    assert all(launches.are_ordered(*pair) for pair in of_both)
    behind_training = [
        each
        for each, (kind, before) in enumerate(zip(kinds[1:], kinds, strict=False), start=1)
        if (kind, before) == ("iteration", "training")
    ]
    assert not any(launches.are_ordered(each - 1, each) for each in behind_training)
