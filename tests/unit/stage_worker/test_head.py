"""The head of a node: traces drawn by hand, and any interleaving of submit, cancel and finish."""

from collections import deque
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from services.stage_worker.head import Head, Iteration
from shared.messages.inference import IterationDone, SampledToken
from tests.unit.stage_worker.support import task

BLOCK_SIZE = 4


def new_head(*, num_in_flight: int = 2, token_budget: int = 8, num_blocks: int = 8) -> Head:
    return Head(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        num_in_flight=num_in_flight,
        token_budget=token_budget,
        max_waiting=64,
        vocab_size=128,
    )


def submit(head: Head, *task_ids: str, prompt_length: int = 3, max_tokens: int = 4, now_s: float = 0) -> None:
    for task_id in task_ids:
        one = task(task_id, prompt_length=prompt_length, max_tokens=max_tokens)
        head.submit(one, deadline_s=now_s + one.timeout_s, traceparent="")


def start(head: Head) -> Iteration:
    iteration = head.next_iteration()
    assert iteration is not None
    return iteration


def rows(iteration: Iteration) -> list[tuple[str, int]]:
    return [(chunk.task_id, chunk.num_tokens) for chunk in iteration.chunks]


def done(iteration: Iteration, *, token: int = 50, finished: tuple[str, ...] = ()) -> IterationDone:
    """All sequences of the iteration that produce get `token`."""
    tokens = tuple(
        SampledToken(task_id=chunk.task_id, token=token, finished=chunk.task_id in finished)
        for chunk in iteration.chunks
        if chunk.produces
    )
    return IterationDone(iteration=iteration.number, tokens=tokens)


def test_two_iterations_of_disjoint_sequences_are_in_flight_at_once() -> None:
    head = new_head(token_budget=6)
    submit(head, "a", "b", "c", "d")
    first, second = start(head), start(head)
    assert rows(first) == [("a", 3), ("b", 3)]
    assert rows(second) == [("c", 3), ("d", 3)]
    assert head.next_iteration() is None
    head.finish_iteration(done(first))
    third = start(head)
    assert rows(third) == [("a", 1), ("b", 1)]
    assert third.tokens == (50, 50)
    assert head.next_iteration() is None


def test_a_decode_waits_for_its_token() -> None:
    head = new_head()
    submit(head, "a")
    first = start(head)
    assert head.next_iteration() is None
    head.finish_iteration(done(first, token=7))
    assert start(head).tokens == (7,)


def test_pieces_of_one_prompt_follow_each_other_in_flight() -> None:
    head = new_head(token_budget=4)
    submit(head, "a", prompt_length=8)
    first, second = start(head), start(head)
    assert (first.tokens, second.tokens) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert [chunk.produces for chunk in first.chunks + second.chunks] == [False, True]
    head.finish_iteration(done(first))
    assert head.next_iteration() is None
    head.finish_iteration(done(second, token=9))
    assert start(head).tokens == (9,)


def test_a_finished_sequence_gives_its_blocks_back() -> None:
    head = new_head()
    submit(head, "a", "b")
    first = start(head)
    (completed,) = head.finish_iteration(done(first, finished=("a",)))
    assert completed.task.task_id == "a"
    assert (head.num_running, head.allocator.num_free) == (1, 6)


def test_a_sequence_without_a_token_is_complete() -> None:
    head = new_head()
    submit(head, "a", max_tokens=0)
    first = start(head)
    sampled = SampledToken(task_id="a", token=None, finished=True)
    (completed,) = head.finish_iteration(IterationDone(iteration=first.number, tokens=(sampled,)))
    assert completed.task.task_id == "a"
    assert head.allocator.num_free == 8


def test_a_cancel_in_mid_flight_frees_the_blocks_and_the_late_token_is_ignored() -> None:
    head = new_head()
    submit(head, "a", "b")
    first = start(head)
    assert head.remove("a")
    assert head.allocator.num_free == 6
    assert head.finish_iteration(done(first)) == []
    assert (head.num_running, head.allocator.num_free) == (1, 6)
    assert rows(start(head)) == [("b", 1)]
    assert not head.remove("a")


def test_a_waiting_sequence_is_cancelled_without_ever_running() -> None:
    head = new_head(num_blocks=2)
    submit(head, "a", "b")
    start(head)
    assert len(head.admission) == 1
    assert head.remove("b")
    assert len(head.admission) == 0


def test_the_expired_are_removed_wherever_they_are() -> None:
    head = new_head(num_blocks=4)
    submit(head, "running", "waiting", max_tokens=12, now_s=0.0)
    submit(head, "late enough", now_s=5.0)
    first = start(head)
    assert [one.task_id for one in head.expired(0.9)] == []
    assert [one.task_id for one in head.expired(1.0)] == ["running", "waiting"]
    assert head.allocator.num_free == 4
    assert rows(start(head)) == [("late enough", 3)]
    assert head.finish_iteration(done(first)) == []


def test_a_reset_returns_everything_and_leaves_nothing_in_flight() -> None:
    head = new_head(num_blocks=4)
    submit(head, "a", "b", max_tokens=12)
    lost = start(head)
    assert [one.task_id for one in head.reset()] == ["a", "b"]
    assert (head.num_running, len(head.admission), head.allocator.num_free) == (0, 0, 4)
    submit(head, "c", "d", prompt_length=8, max_tokens=1)
    assert rows(start(head)) == [("c", 8)]
    assert head.finish_iteration(done(lost)) == []
    assert rows(start(head)) == [("d", 8)]
    assert head.next_iteration() is None


def test_unknown_iterations_are_ignored() -> None:
    head = new_head(num_in_flight=1)
    submit(head, "a")
    first = start(head)
    stranger = SampledToken(task_id="nobody", token=1, finished=True)
    assert head.finish_iteration(IterationDone(iteration=77, tokens=(stranger,))) == []
    assert head.next_iteration() is None
    head.finish_iteration(done(first))
    assert head.next_iteration() is not None


def token_after(text: list[int]) -> int:
    """The fake model: any function of the whole text."""
    return (31 * sum((place + 1) * token for place, token in enumerate(text)) + 7) % 1000


@dataclass
class FakePipeline:
    """Runs iterations in order on one cache, as stages do: later ones see what earlier ones wrote."""

    head: Head
    cache: dict[int, int] = field(default_factory=dict)
    in_flight: deque[Iteration] = field(default_factory=deque)
    answers: dict[str, list[int]] = field(default_factory=dict)
    completed: set[str] = field(default_factory=set)

    def start_all(self) -> None:
        while (iteration := self.head.next_iteration()) is not None:
            self.in_flight.append(iteration)

    def finish(self) -> None:
        if not self.in_flight:
            return
        iteration, first, sampled = self.in_flight.popleft(), 0, []
        for chunk in iteration.chunks:
            tokens = iteration.tokens[first : first + chunk.num_tokens]
            first += chunk.num_tokens
            for place, token in enumerate(tokens, start=chunk.start):
                self.cache[self._slot(chunk.blocks, place)] = token
            if chunk.produces:
                text = [
                    self.cache[self._slot(chunk.blocks, at)] for at in range(chunk.start + chunk.num_tokens)
                ]
                token, is_last = token_after(text), chunk.index + 1 == chunk.sampling.max_tokens
                self.answers.setdefault(chunk.task_id, []).append(token)
                sampled.append(SampledToken(task_id=chunk.task_id, token=token, finished=is_last))
        completed = self.head.finish_iteration(
            IterationDone(iteration=iteration.number, tokens=tuple(sampled))
        )
        self.completed |= {one.task.task_id for one in completed}

    def _slot(self, blocks: tuple[int, ...], place: int) -> int:
        return blocks[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE


def assert_every_block_has_one_owner(head: Head) -> None:
    owned = [block for one in head._running.values() for block in one.blocks]
    allocator = head.allocator
    free = [*allocator._given_back, *range(allocator._num_used_ever, allocator.num_blocks)]
    assert len(free) == allocator.num_free
    assert sorted(owned + free) == list(range(allocator.num_blocks))


def expected_answer(prompt_length: int, max_tokens: int) -> list[int]:
    text = list(range(prompt_length))
    for _ in range(max_tokens):
        text.append(token_after(text))
    return text[prompt_length:]


Submit = st.tuples(st.just("submit"), st.integers(1, 12), st.integers(1, 6))
Cancel = st.tuples(st.just("cancel"), st.integers(0, 9), st.just(0))
Start = st.just(("start", 0, 0))
Finish = st.just(("finish", 0, 0))


@settings(max_examples=150, deadline=None)
@given(
    commands=st.lists(st.one_of(Submit, Cancel, Start, Finish), max_size=40),
    num_in_flight=st.integers(1, 3),
    token_budget=st.integers(1, 7),
)
def test_any_interleaving_keeps_blocks_apart_and_answers_whole(
    commands: list[tuple[str, int, int]], num_in_flight: int, token_budget: int
) -> None:
    head = new_head(num_in_flight=num_in_flight, token_budget=token_budget, num_blocks=6)
    pipeline = FakePipeline(head)
    wanted: dict[str, list[int]] = {}
    cancelled: set[str] = set()
    for name, first, second in commands:
        match name:
            case "submit":
                task_id = f"t{len(wanted)}"
                submit(head, task_id, prompt_length=first, max_tokens=second)
                wanted[task_id] = expected_answer(first, second)
            case "cancel":
                if head.remove(f"t{first}"):
                    cancelled.add(f"t{first}")
            case "start":
                pipeline.start_all()
            case "finish":
                pipeline.finish()
        assert_every_block_has_one_owner(head)
    pipeline.start_all()
    while pipeline.in_flight:
        pipeline.finish()
        pipeline.start_all()
        assert_every_block_has_one_owner(head)
    assert head.allocator.num_free == head.allocator.num_blocks
    assert (head.num_running, len(head.admission)) == (0, 0)
    assert pipeline.completed == wanted.keys() - cancelled
    for task_id in pipeline.completed:
        assert pipeline.answers[task_id] == wanted[task_id]
