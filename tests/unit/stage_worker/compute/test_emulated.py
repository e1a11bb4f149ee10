import asyncio
import math
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs

from lemix.simulation.loop import VirtualClock, run_virtual
from services.stage_worker.compute.emulated import NO_TENSOR, EmulatedExecutor
from services.stage_worker.compute.executor import Executor, SequenceChunk
from services.stage_worker.settings import StageWorkerSettings
from shared.errors import LemixError, VersionGoneError
from shared.messages.inference import Sampling, SequenceResult, SequenceStart
from shared.messages.training import Microbatch, StepOrder
from shared.messages.weights import MergeGroup, MergeMember
from shared.profiles.records import StageMemory
from shared.profiles.times import Work
from shared.slices import WHOLE, NumSlices

VOCAB_SIZE = 50
MEMORY = StageMemory(
    weights_bytes=40,
    training_bytes=120,
    kv_bytes_per_token=1,
    activation_bytes_per_token=10,
    capacity_bytes=320,
    host_bytes_per_s=5,
)
"""Room for the activations of eight rows, each of which takes two seconds to the host."""


class Times:
    """One second for each row, ten for its backward, a hundred for a step."""

    def iteration_s(self, work: Work) -> float:
        return work.num_tokens + work.num_pairs / 1000

    def forward_s(self, work: Work) -> float:
        return float(work.num_tokens)

    def backward_s(self, work: Work) -> float:
        return 10.0 * work.num_tokens

    def step_s(self) -> float:
        return 100.0


class Clock:
    """Jumps to whatever is waited for."""

    def __init__(self) -> None:
        self.s = 0.0

    def now_s(self) -> float:
        return self.s

    def wall_s(self) -> float:
        return self.s

    async def hold_until(self, at_s: float) -> None:
        assert at_s >= self.s
        self.s = at_s


def executor(
    clock: Clock,
    stage: int,
    memory: StageMemory | None = None,
    num_slices: NumSlices = WHOLE,
    **changes: bool,
) -> EmulatedExecutor:
    settings = StageWorkerSettings(node=0, stage=stage, num_stages=2, **changes)
    return EmulatedExecutor(
        settings,
        "stage-a",
        times=Times(),
        memory=memory,
        vocab_size=VOCAB_SIZE,
        context_length=128,
        num_slices=num_slices,
        hold_until=clock.hold_until,
        clock=clock,
    )


def chunk(task_id: str, *, start: int, num_tokens: int, index: int = 0) -> SequenceChunk:
    return SequenceChunk(
        task_id=task_id, start=start, num_tokens=num_tokens, blocks=(0,), produces=True, index=index
    )


async def results(
    it: EmulatedExecutor, *chunks: SequenceChunk, **sampling: object
) -> tuple[SequenceResult, ...]:
    """Of an iteration at the last stage."""
    start = SequenceStart(
        sequence=0,
        task_id="a",
        gateway="g",
        sampling=Sampling(**{"max_tokens": 2, **sampling}),
        num_prompt_tokens=3,
    )
    return (await it.iteration(chunks, NO_TENSOR, states=[it.begin(start) for _ in chunks])).results


def microbatch(index: int = 0) -> Microbatch:
    return Microbatch(
        fence=1,
        batch_id="b",
        index=index,
        count=2,
        lengths=(3, 2),
        label_rows=(0, 1, 3),
        labels=(4, 5, 6),
        loss_weight=1 / 6,
    )


async def test_preferences_take_a_forward_more_and_begin_with_a_loss_of_chance() -> None:
    clock, pairs = Clock(), structs.replace(microbatch(), beta=0.1, loss_weight=1.0)
    output = await executor(clock, 0).forward(pairs, (1, 2, 3, 4, 5))
    assert (output.hidden, output.reference, clock.s) == (NO_TENSOR, NO_TENSOR, 5.0 + 5.0)
    last = await executor(Clock(), 1).forward(pairs, NO_TENSOR, NO_TENSOR)
    assert last.loss == pytest.approx(math.log(2))


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


async def test_it_is_an_executor_and_says_what_it_runs() -> None:
    it: Executor[int, None] = executor(Clock(), 0)
    facts = await it.load()
    assert (facts.vocab_size, facts.context_length, facts.weights.version) == (VOCAB_SIZE, 128, 0)
    offer = await it.offer(1, "peer", "activations")
    assert (await it.accept(offer)).accepted


async def test_an_iteration_takes_the_time_of_all_its_rows_and_pairs() -> None:
    clock = Clock()
    chunks = [chunk("a", start=4, num_tokens=2), chunk("b", start=9, num_tokens=1)]
    output = await executor(clock, 0).iteration(chunks, (1, 2, 3))
    assert output.hidden == NO_TENSOR
    assert output.results == ()
    # Rows at 4 and 5 attend to 5 and 6 positions, the one at 9 to 10.
    assert clock.s == pytest.approx(3 + (5 + 6 + 10) / 1000)


async def test_the_last_stage_gives_tokens_until_max_tokens() -> None:
    it = executor(Clock(), 1)
    scored = replace(chunk("b", start=0, num_tokens=2), produces=False, targets=(7, 8))
    silent = replace(scored, task_id="c", targets=())
    chunks = [chunk("a", start=0, num_tokens=3), scored, silent]
    first, prompt = await results(it, *chunks)
    assert (first.task_id, first.index, first.finish) == ("a", 0, None)
    assert first.token is not None and 0 <= first.token.token < VOCAB_SIZE
    assert [each.token for each in prompt.prompt] == [7, 8]
    assert prompt.token is None and prompt.finish is None
    (last,) = await results(it, chunk("a", start=3, num_tokens=1, index=1))
    assert (last.index, last.finish) == (1, "length")


async def test_a_request_for_no_token_gets_none() -> None:
    (result,) = await results(executor(Clock(), 1), chunk("a", start=0, num_tokens=3), max_tokens=0)
    assert result.token is None
    assert result.finish == "length"


async def test_no_token_stops_a_sequence_and_logprobs_are_those_of_chance() -> None:
    stops = tuple(range(VOCAB_SIZE - 1))
    whole = chunk("a", start=0, num_tokens=3)
    (result,) = await results(executor(Clock(), 1), whole, stop_token_ids=stops, num_logprobs=2)
    assert result.token is not None
    assert result.token.token == VOCAB_SIZE - 1
    assert result.token.logprob == pytest.approx(math.log(1 / VOCAB_SIZE))
    assert len(result.token.top) == 2


async def test_a_batch_runs_forward_backward_and_steps() -> None:
    clock = Clock()
    first, last = executor(clock, 0), executor(clock, 1)
    forward = await first.forward(microbatch(), (1, 2, 3, 4, 5))
    assert (clock.s, forward.version, forward.hidden) == (5.0, 0, NO_TENSOR)
    output = await last.forward(microbatch(), NO_TENSOR)
    assert clock.s == 5.0 + 5.0 + 50.0, "the last stage's forward includes its backward"
    assert output.loss == pytest.approx(math.log(VOCAB_SIZE) / 2), "half of the batch's labels"
    assert output.gradient is not None
    assert (await first.backward("b", 0, output.gradient)).gradient is None
    assert clock.s == 60.0 + 50.0
    assert await first.finish_batch("b") is None
    await first.step(StepOrder(fence=1, batch_id="b", version=1, learning_rate=0.1))
    assert clock.s == 210.0
    assert (await first.forward(microbatch(1), (1,))).version == 1


@pytest.mark.parametrize(("stage", "at_s"), [(0, [2.5]), (1, [2.5, 5.0, 30.0])])
async def test_ops_give_way_between_equal_slices_of_each_pass(stage: int, at_s: list[float]) -> None:
    clock, gave_way_s = Clock(), list[float]()
    it = executor(clock, stage, num_slices=NumSlices(2, 4))

    async def give_way() -> None:
        gave_way_s.append(clock.s)

    await it.forward(microbatch(), (1, 2, 3, 4, 5), None, give_way)
    assert gave_way_s == pytest.approx(at_s)
    gave_way_s.clear()
    began_s = clock.s
    await it.step(StepOrder(fence=1, batch_id="b", version=1, learning_rate=0.1), give_way)
    assert gave_way_s == [began_s + 25.0, began_s + 50.0, began_s + 75.0]
    assert (await it.load()).num_slices == (2, 4)


async def test_ops_follow_each_other() -> None:
    clock = Clock()
    it = executor(clock, 0)
    held: list[float] = []

    async def note(at_s: float) -> None:
        held.append(at_s)

    it._hold_until = note
    await it.iteration([chunk("a", start=0, num_tokens=1)], (1,))
    await it.iteration([chunk("b", start=0, num_tokens=1)], (1,))
    assert held == pytest.approx([1.001, 2.002])


async def test_a_restore_drops_what_is_in_flight() -> None:
    it = executor(Clock(), 0)
    await it.forward(microbatch(), (1,))
    await it.restore("", 7)
    with pytest.raises(LemixError, match="microbatch 0 of b"):
        await it.backward("b", 0, NO_TENSOR)
    await it.step(StepOrder(fence=1, batch_id="b", version=8, learning_rate=0.1))


async def test_a_shard_is_a_file_of_its_own(tmp_path: Path) -> None:
    names = set()
    for stage in range(2):
        it = executor(Clock(), stage)
        shard = await it.write(await it.snapshot(), tmp_path)
        assert set(shard.file_by_tensor.values()) == set(shard.sha256_by_file)
        names |= set(shard.sha256_by_file)
    assert names_in(tmp_path) == names
    assert len(names) == 2


async def test_activations_in_flight_leave_no_room_until_they_are_gone_backward() -> None:
    clock = Clock()
    first = executor(clock, 0, memory=MEMORY)
    await first.forward(microbatch(0), (1,))
    with pytest.raises(MemoryError, match="5 tokens do not fit: 5 of 8"):
        await first.forward(microbatch(1), (1,))
    assert clock.s == 5.0, "it fails at once"
    await first.backward("b", 0, NO_TENSOR)
    await first.forward(microbatch(1), (1,))


async def test_the_last_stage_needs_room_for_one_microbatch_at_a_time() -> None:
    last = executor(Clock(), 1, memory=MEMORY)
    for index in range(2):
        await last.forward(microbatch(index), NO_TENSOR)
    cramped = executor(Clock(), 1, memory=MEMORY.model_copy(update={"capacity_bytes": 240}))
    with pytest.raises(MemoryError, match="0 of 4"):
        await cramped.forward(microbatch(), NO_TENSOR)


async def test_what_is_offloaded_takes_time_and_no_room() -> None:
    clock = Clock()
    first, last = executor(clock, 0, memory=MEMORY), executor(clock, 1, memory=MEMORY)
    offloaded = structs.replace(microbatch(), offload=True)
    await first.forward(offloaded, (1,))
    assert clock.s == 5.0 + 10.0
    await first.forward(microbatch(1), (1,))
    assert clock.s == 15.0 + 5.0
    await first.backward("b", 0, NO_TENSOR)
    assert clock.s == 20.0 + 50.0 + 10.0
    await last.forward(offloaded, NO_TENSOR)
    assert clock.s == 80.0 + 5.0 + 10.0 + 50.0 + 10.0


async def test_a_forward_that_is_repeated_takes_time_and_no_room() -> None:
    clock = Clock()
    first, last = (executor(clock, stage, MEMORY, activation_checkpointing=True) for stage in (0, 1))
    for index in range(2):
        await first.forward(microbatch(index), (1,))
    assert clock.s == 2 * 5.0
    await first.backward("b", 0, NO_TENSOR)
    assert clock.s == 10.0 + 5.0 + 50.0
    await last.forward(microbatch(), NO_TENSOR)
    assert clock.s == 65.0 + 5.0 + 50.0, "its backward follows at once"


async def test_a_restore_frees_the_room_and_loads_the_weights() -> None:
    clock = Clock()
    it = executor(clock, 0, memory=MEMORY)
    await it.forward(microbatch(0), (1,))
    await it.restore("", 0)
    assert clock.s == 5.0 + 40 / 5
    await it.forward(microbatch(1), (1,))


async def test_only_kept_versions_and_the_newest_can_be_asked_for() -> None:
    it, rows = executor(Clock(), 0), [chunk("a", start=0, num_tokens=1)]
    await it.keep()
    await it.step(StepOrder(fence=1, batch_id="b", version=1, learning_rate=0.1))
    for version in (None, 0, 1):
        await it.iteration(rows, (1,), version)
    await it.release(0)
    with pytest.raises(VersionGoneError, match="version 0 is gone"):
        await it.iteration(rows, (1,), 0)
    await it.keep()
    await it.restore("", 7)
    for version in (1, 7):
        await it.iteration(rows, (1,), version)
    with pytest.raises(VersionGoneError):
        await it.iteration(rows, (1,), 0)


def test_a_mean_takes_what_the_weights_take_to_the_host_and_the_device_works_on() -> None:
    async def main() -> None:
        clock = VirtualClock(asyncio.get_running_loop())
        it = EmulatedExecutor(
            StageWorkerSettings(node=0, stage=0, num_stages=2),
            "stage-a",
            times=Times(),
            memory=MEMORY,
            vocab_size=VOCAB_SIZE,
            context_length=128,
            hold_until=clock.sleep_until,
            clock=clock,
        )
        group = MergeGroup(name="m", members=(MergeMember(node=0, fence=1, share=1.0),))
        await it.copy_state()
        averaging = asyncio.create_task(it.average(None, group, await it.rendezvous()))
        await it.iteration([chunk("a", start=0, num_tokens=1)], (1,))
        assert clock.now_s() < 2 < 40 / 5
        assert not averaging.done()
        await averaging
        assert clock.now_s() == 40 / 5
        await it.adopt_state(None, 5)
        assert (await it.forward(microbatch(), (1,))).version == 5

    run_virtual(main())
