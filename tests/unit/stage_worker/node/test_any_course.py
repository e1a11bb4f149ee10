"""Any interleaving of arrivals, cancels, lost iterations, steps and preemptions on a node."""

from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from services.stage_worker.node.node_scheduler import NodeScheduler
from shared.messages.inference import InferenceTask, Sampling
from tests.unit.stage_worker.node.fake_pipeline import BLOCK_SIZE, FakePipeline, answer_to

NUM_BLOCKS = 6


class Course:
    """A node with room for little, what was asked of it, and what became of that."""

    def __init__(self, *, num_in_flight: int, token_budget: int, serving: str) -> None:
        self.scheduler = NodeScheduler(
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            num_in_flight=num_in_flight,
            token_budget=token_budget,
            max_deferrable_tokens=10,
            max_waiting=64,
            vocab_size=1000,
        )
        if serving != "newest":
            self.scheduler.restored(0, serving)
        self.pipeline = FakePipeline(self.scheduler)
        self.wanted: dict[str, list[int]] = {}
        self.gone: set[str] = set()

    def do(self, name: str, first: int, second: int) -> None:
        match name:
            case "submit":
                self.submit(prompt_of(first), second)
            case "cancel":
                if self.scheduler.remove(f"t{first}"):
                    self.gone.add(f"t{first}")
            case "start":
                self.pipeline.start_all()
            case "finish":
                self.gone |= self.pipeline.finish()
            case "put off":
                self.gone |= self.pipeline.finish(puts_off=True)
            case "lose":
                self.gone |= self.pipeline.lose()
            case "step":
                self.pipeline.step(first)
            case "publish":
                self.publish()
            case "reset":
                self.pipeline.in_flight.clear()
                self.gone |= {one.task_id for one in self.scheduler.reset()}
        self.check()

    def submit(self, prompt: tuple[int, ...], max_tokens: int) -> None:
        task_id = f"t{len(self.wanted)}"
        task = InferenceTask(
            task_id=task_id,
            gateway="g",
            prompt=prompt,
            sampling=Sampling(max_tokens=max_tokens),
            timeout_s=1.0,
        )
        self.scheduler.submit(task, deadline_s=1.0, traceparent="")
        self.wanted[task_id] = answer_to(prompt, max_tokens)

    def publish(self) -> None:
        if self.scheduler.versions.published is not None:
            self.scheduler.versions.publish(self.scheduler.versions.published + 1)

    def check(self) -> None:
        """Every block is free, or can be found, or has as many holders as are counted."""
        blocks, running = self.scheduler.blocks, self.scheduler._running.values()
        cache, allocator = blocks._cache, blocks._allocator
        holders = Counter(block for one in running for block in one.held.blocks)
        free = [*allocator._given_back, *range(allocator._num_used_ever, NUM_BLOCKS)]
        assert sorted([*holders, *free, *cache._idle]) == list(range(NUM_BLOCKS))
        for block, count in holders.items():
            assert count == (cache._kept[block].num_holders if block in cache._kept else 1)
        promised = {one.held.promised: one.number for one in running if one.held.promised}
        assert blocks._promised == promised

    def end(self) -> None:
        """Everything that is left comes to its end, and leaves nothing behind."""
        self.gone |= self.pipeline.finish_all()
        self.check()
        assert (self.scheduler.num_running, len(self.scheduler.admission)) == (0, 0)
        assert self.scheduler.blocks.num_free == NUM_BLOCKS
        assert self.pipeline.completed == self.wanted.keys() - self.gone
        for task_id in self.pipeline.completed:
            assert self.pipeline.answers[task_id] == self.wanted[task_id]


def prompt_of(number: int) -> tuple[int, ...]:
    """Prompts of 1 to 12 tokens; many begin alike."""
    length, beginning = 1 + number % 12, number // 12
    return (beginning, *range(1, length))


Command = tuple[str, int, int]
Submit = st.tuples(st.just("submit"), st.integers(0, 35), st.integers(1, 9))
Cancel = st.tuples(st.just("cancel"), st.integers(0, 9), st.just(0))
Step = st.tuples(st.just("step"), st.integers(0, 1), st.just(0))


def plain(*names: str) -> Any:
    return st.sampled_from([(name, 0, 0) for name in names])


COMMANDS = st.lists(
    st.one_of(Submit, Submit, Cancel, plain("start", "start", "finish", "finish", "put off")), max_size=40
)
FAULTS = st.lists(
    st.one_of(Submit, Submit, Cancel, Step, plain("start", "finish", "put off", "lose", "publish", "reset")),
    max_size=40,
)
SERVING = st.sampled_from(["newest", "published", "pinned"])


@settings(max_examples=150)
@given(COMMANDS, st.integers(1, 3), st.integers(1, 7))
def test_answers_are_those_of_an_undisturbed_loop(
    commands: list[Command], num_in_flight: int, token_budget: int
) -> None:
    course = Course(num_in_flight=num_in_flight, token_budget=token_budget, serving="newest")
    for command in commands:
        course.do(*command)
    course.end()


@settings(max_examples=150)
@given(FAULTS, st.integers(1, 3), st.integers(1, 7), SERVING)
def test_faults_and_new_weights_leave_nothing_behind_and_no_answer_wrong(
    commands: list[Command], num_in_flight: int, token_budget: int, serving: str
) -> None:
    course = Course(num_in_flight=num_in_flight, token_budget=token_budget, serving=serving)
    for command in commands:
        course.do(*command)
    course.end()
    course.submit((1,), 1)
    course.pipeline.finish_all()
    assert len(course.pipeline.table) == 1, "the stage still knows sequences that are gone"


@settings(max_examples=100)
@given(FAULTS, st.integers(1, 3), SERVING)
def test_blocks_that_can_be_found_were_written_with_their_version_by_every_stage(
    commands: list[Command], num_in_flight: int, serving: str
) -> None:
    course = Course(num_in_flight=num_in_flight, token_budget=5, serving=serving)
    for command in commands:
        course.do(*command)
        for key, block in course.scheduler.blocks._cache._block_by_key.items():
            assert course.pipeline.versions_of([block], BLOCK_SIZE) == {(key.version, key.version)}


def crowd(count: int, *, max_tokens: int) -> Course:
    course = Course(num_in_flight=2, token_budget=16, serving="newest")
    for number in range(count):
        course.submit((number, 1, 2, 3), max_tokens)
    return course


def test_the_youngest_is_computed_again_when_blocks_run_out_and_says_the_same() -> None:
    course = crowd(3, max_tokens=17)
    course.end()
    assert course.scheduler.num_preempted > 0
    assert len(course.pipeline.completed) == 3


def test_a_sequence_that_fills_the_whole_cache_ends_among_others() -> None:
    course = Course(num_in_flight=2, token_budget=16, serving="newest")
    for number in range(4):
        course.submit((number, 1, 2, 3), BLOCK_SIZE * NUM_BLOCKS - 3)
    course.end()
    assert len(course.pipeline.completed) == 4


def test_the_oldest_never_loses_its_blocks() -> None:
    course = crowd(3, max_tokens=17)
    oldest = next(iter(course.scheduler._here.values()))
    course.pipeline.start_all()
    while oldest.task.task_id not in course.pipeline.completed:
        assert oldest.number in course.scheduler._running
        course.pipeline.finish()
        course.pipeline.start_all()


def test_eight_choices_of_a_prompt_cost_one_prefill_and_the_rest_of_a_block_each() -> None:
    scheduler = NodeScheduler(
        num_blocks=200,
        block_size=BLOCK_SIZE,
        num_in_flight=2,
        token_budget=16,
        max_deferrable_tokens=10,
        max_waiting=64,
        vocab_size=1000,
    )
    pipeline, prompt = FakePipeline(scheduler), tuple(range(42))
    for number in range(8):
        task = InferenceTask(
            task_id=str(number),
            gateway="g",
            prompt=prompt,
            sampling=Sampling(max_tokens=1, seed=number),
            timeout_s=1.0,
        )
        scheduler.submit(task, deadline_s=1.0, traceparent="")
    pipeline.finish_all()
    assert len(pipeline.completed) == 8
    assert pipeline.num_rows == len(prompt) + 7 * (len(prompt) % BLOCK_SIZE)
