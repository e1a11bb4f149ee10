"""A pipeline that only remembers which token was written where, and with which weights."""

from collections import deque
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from services.stage_worker.compute.executor import SequenceChunk
from services.stage_worker.compute.sampling.sequences import SequenceState
from services.stage_worker.node.node_scheduler import FirstRows, NodeScheduler
from services.stage_worker.pipeline.sequences import SequenceTable
from shared.errors import UnknownSequenceError
from shared.messages.inference import IterationDone, SampledToken

BLOCK_SIZE = 4


def token_after(text: Many[int]) -> int:
    """The fake model: any function of the whole text."""
    return (31 * sum((place + 1) * token for place, token in enumerate(text)) + 7) % 1000


def answer_to(prompt: Many[int], max_tokens: int) -> list[int]:
    """The whole answer of an undisturbed loop."""
    text = list(prompt)
    for _ in range(max_tokens):
        text.append(token_after(text))
    return text[len(prompt) :]


@dataclass
class FakePipeline:
    """Runs iterations in order on one cache, as stages do: later ones see what earlier ones wrote."""

    scheduler: NodeScheduler
    cache: dict[int, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    """Each slot's token, and the version that each stage wrote it with."""
    in_flight: deque[FirstRows] = field(default_factory=deque)
    table: SequenceTable = field(
        default_factory=lambda: SequenceTable(
            lambda start: SequenceState(start.gateway, start.sampling), block_size=BLOCK_SIZE
        )
    )
    """The last stage's."""
    newest: list[int] = field(default_factory=lambda: [0, 0])
    """The version of each stage's newest weights."""
    answers: dict[str, list[int]] = field(default_factory=dict)
    completed: set[str] = field(default_factory=set)
    num_rows: int = 0
    """Rows that were computed."""

    def start_all(self) -> None:
        while (first := self.scheduler.next_iteration()) is not None:
            self.in_flight.append(first)

    def step(self, stage: int) -> None:
        """A stage has new weights."""
        self.newest[stage] += 1
        self.scheduler.newest_version = self.newest[0]

    def finish(self, *, puts_off: bool = False) -> set[str]:
        """`puts_off`: no token can be drawn yet. Returns the tasks that are lost, as `lose` does."""
        if not self.in_flight:
            return set()
        iteration = self.in_flight[0].iteration
        try:
            entered = self.table.enter(iteration)
        except UnknownSequenceError:
            return self.lose()
        tokens, sampled = deque(self.in_flight.popleft().tokens), []
        versions = tuple(self.newest if iteration.version is None else [iteration.version] * len(self.newest))
        for number, chunk, state in zip(iteration.sequences, entered.chunks, entered.states, strict=True):
            self._write(chunk, tokens, versions)
            if chunk.produces and puts_off:
                sampled.append(SampledToken(sequence=number, token=None, finished=False))
            elif chunk.produces:
                sampled.append(self._draw(number, chunk, state))
        done = IterationDone(
            iteration=iteration.number,
            tokens=tuple(sampled),
            weights_version=versions[0] if len(set(versions)) == 1 else None,
        )
        self.completed |= {task.task_id for task in self.scheduler.finish_iteration(done)}
        return set()

    def finish_all(self) -> set[str]:
        """Run until nothing is in flight; returns the tasks that are lost."""
        lost = set[str]()
        self.start_all()
        while self.in_flight:
            lost |= self.finish()
            self.start_all()
        return lost

    def lose(self) -> set[str]:
        """The oldest iteration does not reach the last stage; returns the tasks that are lost with it."""
        if not self.in_flight:
            return set()
        lost = self.scheduler.lose_iteration(self.in_flight.popleft().iteration.number)
        return {task.task_id for task in lost}

    def versions_of(self, blocks: Many[int], num_rows: int) -> set[tuple[int, ...]]:
        """With which versions the first rows of these blocks were written, stage by stage."""
        return {self.cache[_slot(blocks, place)][1] for place in range(num_rows)}

    def _write(self, chunk: SequenceChunk, tokens: deque[int], versions: tuple[int, ...]) -> None:
        self.num_rows += chunk.num_tokens
        for place in range(chunk.start, chunk.start + chunk.num_tokens):
            self.cache[_slot(chunk.blocks, place)] = (tokens.popleft(), versions)

    def _draw(self, number: int, chunk: SequenceChunk, state: SequenceState) -> SampledToken:
        text = [self.cache[_slot(chunk.blocks, at)][0] for at in range(chunk.start + chunk.num_tokens)]
        token, answer = token_after(text), self.answers.setdefault(chunk.task_id, [])
        assert chunk.index == len(answer), "a token is told twice, or missing"
        answer.append(token)
        return SampledToken(sequence=number, token=token, finished=len(answer) == state.sampling.max_tokens)


def _slot(blocks: Many[int], place: int) -> int:
    return blocks[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE
