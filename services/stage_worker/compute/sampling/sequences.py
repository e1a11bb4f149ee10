"""The last stage's knowledge of the running sequences, from the first chunk of each to its end."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from services.stage_worker.compute.sampling.grammar import Grammar
from shared.errors import UnknownSequenceError
from shared.messages.inference import FinishReason, Sampling, SequenceChunk, SequenceStart


@dataclass(slots=True)
class SequenceState:
    """One sequence: how its tokens are drawn, and what the next draw depends on."""

    gateway: str
    sampling: Sampling
    grammar: Grammar | None = None
    """Holds the text to the schema, where there is one."""
    prompt: set[int] = field(default_factory=set)
    """Tokens of the prompt, when the draw depends on them."""
    generated: Counter[int] = field(default_factory=Counter)
    """How often each token was drawn, when the draw depends on it."""

    def is_ready(self) -> bool:
        """Whether the next token can be drawn; waits a little for it."""
        return self.grammar is None or self.grammar.is_ready()

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end the sequence: nothing follows a text that is whole by its schema."""
        ends = () if self.grammar is None else self.grammar.end_tokens
        return (*self.sampling.stop_token_ids, *ends)

    def finish_reason(self, token: int, index: int) -> FinishReason | None:
        """Whether the token, the sequence's number `index`, ends it."""
        if token in self.stop_token_ids:
            return "stop"
        return "length" if index + 1 >= self.sampling.max_tokens else None

    def drew(self, token: int) -> None:
        """Go on with this token."""
        if self.sampling.has_penalties:
            self.generated[token] += 1
        if self.grammar is not None:
            self.grammar.consume(token)


class SequenceTable:
    """The states of all sequences that run here, by task."""

    def __init__(self, begin: Callable[[SequenceStart], SequenceState]) -> None:
        self._begin = begin
        self._states: dict[str, SequenceState] = {}

    def __len__(self) -> int:
        return len(self._states)

    def enter(self, chunks: Sequence[SequenceChunk], left: Iterable[str]) -> tuple[SequenceState, ...]:
        """Take in an iteration: forget the sequences that have left, and return the state of each chunk's.

        Raises UnknownSequenceError when the first chunk of a sequence never came here.
        """
        self.drop(left)
        return tuple(self._state_of(chunk) for chunk in chunks)

    def drop(self, task_ids: Iterable[str]) -> None:
        """Forget these sequences, if they are here."""
        for task_id in task_ids:
            self._states.pop(task_id, None)

    def clear(self) -> None:
        self._states.clear()

    def _state_of(self, chunk: SequenceChunk) -> SequenceState:
        state = self._states.get(chunk.task_id) if chunk.begins is None else self._begin(chunk.begins)
        if state is None:
            raise UnknownSequenceError(f"the beginning of {chunk.task_id} never came to this stage")
        if chunk.begins is not None and not _ends_at_once(chunk, state):
            self._states[chunk.task_id] = state
        state.prompt.update(chunk.tokens)
        return state


def _ends_at_once(chunk: SequenceChunk, state: SequenceState) -> bool:
    """Whether the sequence's first chunk is its last one, too: no other will ask for its state."""
    return chunk.produces and state.sampling.max_tokens == 0
