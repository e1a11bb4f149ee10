"""Texts that a model wrote itself before it learnt: a version that finds them unlikely has forgotten."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log

from shared.encoding import LabelledTokens
from shared.messages.inference import Sampling, SequenceResult

MAX_NEW_TOKENS = 32
"""Tokens that a sample has at most, beside its prompt."""
SHARE_OF_NOISE = 0.9
"""A model whose samples are worth so much of pure noise's entropy has learnt nothing that it could lose."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Texts that a version has written."""

    version: int
    loss: float
    """The mean loss of that version per token that it wrote, in nats."""
    examples: tuple[LabelledTokens, ...]

    def are_noise(self, vocab_size: int) -> bool:
        """Whether the version that wrote them knew hardly anything."""
        return self.loss > SHARE_OF_NOISE * log(vocab_size)


class Drawing:
    """A version writes samples: each is one task, drawn from the plain distribution (temperature 1)."""

    def __init__(
        self,
        name: str,
        version: int,
        openings: Sequence[tuple[int, ...]],
        *,
        max_tokens: int,
        stop_token_ids: tuple[int, ...],
    ) -> None:
        """`name` is this drawing's alone. `max_tokens`: those of prompt and sample together, at most."""
        self._prompts = [opening[: max_tokens - 1] for opening in openings]
        self._name = name
        self._version = version
        self._max_tokens = max_tokens
        self._stop_token_ids = stop_token_ids
        self._attempts = itertools.count()
        self._asked: dict[str, int] = {}
        """By task: the place of its prompt."""
        self._tokens: dict[int, list[int]] = {}
        self._logprobs: dict[int, list[float]] = {}
        self._finished: set[int] = set()

    @property
    def asked(self) -> Iterable[str]:
        """Tasks that are under way."""
        return self._asked

    @property
    def samples(self) -> Samples | None:
        """All of them, once they are written."""
        if len(self._finished) < len(self._prompts):
            return None
        logprobs = [each for drawn in self._logprobs.values() for each in drawn]
        examples = tuple(_example(prompt, self._tokens[place]) for place, prompt in enumerate(self._prompts))
        return Samples(self._version, -sum(logprobs) / len(logprobs), examples)

    def next(self) -> dict[str, tuple[tuple[int, ...], Sampling]]:
        """The prompts to go on from, and how to draw, by task.

        A task that failed may still run, so that another one has its prompt then.
        """
        busy = self._finished.union(self._asked.values())
        new = {
            f"{self._name}-{next(self._attempts)}": place
            for place in range(len(self._prompts))
            if place not in busy
        }
        self._asked |= new
        for place in new.values():
            self._tokens[place], self._logprobs[place] = [], []
        return {task_id: (self._prompts[place], self._sampling(place)) for task_id, place in new.items()}

    def drew(self, result: SequenceResult) -> None:
        """Take a token of a task; one that has lost a token is drawn anew."""
        place, token = self._asked.get(result.task_id), result.token
        if place is None or token is None:
            return
        if token.logprob is None or result.index != len(self._tokens[place]):
            self.failed(result.task_id)
            return
        self._tokens[place].append(token.token)
        self._logprobs[place].append(token.logprob)
        if result.finish is not None:
            del self._asked[result.task_id]
            self._finished.add(place)

    def failed(self, task_id: str) -> None:
        """Note that a task under way will not come back: its prompt is asked again, with the same outcome."""
        self._asked.pop(task_id, None)

    def _sampling(self, place: int) -> Sampling:
        return Sampling(
            max_tokens=min(MAX_NEW_TOKENS, self._max_tokens - len(self._prompts[place])),
            seed=place,
            stop_token_ids=self._stop_token_ids,
            num_logprobs=0,
        )


def _example(prompt: tuple[int, ...], drawn: list[int]) -> LabelledTokens:
    first = len(prompt) - 1
    return LabelledTokens((*prompt, *drawn), tuple(range(first, first + len(drawn))))
