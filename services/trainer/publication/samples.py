"""Texts that a model wrote itself before it learnt: a version that finds them unlikely has forgotten."""

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
        fitting = [opening[: max_tokens - 1] for opening in openings]
        self._prompts = {f"{name}-{number}": opening for number, opening in enumerate(fitting)}
        self._version = version
        self._max_tokens = max_tokens
        self._stop_token_ids = stop_token_ids
        self._asked: set[str] = set()
        self._tokens: dict[str, list[int]] = {}
        self._logprobs: dict[str, list[float]] = {}
        self._finished: set[str] = set()

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
        examples = tuple(
            LabelledTokens(
                (*prompt, *self._tokens[task_id]),
                tuple(range(len(prompt) - 1, len(prompt) - 1 + len(self._tokens[task_id]))),
            )
            for task_id, prompt in self._prompts.items()
        )
        return Samples(self._version, -sum(logprobs) / len(logprobs), examples)

    def next(self) -> dict[str, tuple[tuple[int, ...], Sampling]]:
        """The prompts to go on from, and how to draw, by task."""
        unasked = [each for each in self._prompts if each not in self._asked | self._finished]
        self._asked.update(unasked)
        return {task_id: (self._prompts[task_id], self._sampling(task_id)) for task_id in unasked}

    def drew(self, result: SequenceResult) -> None:
        """Take a token of a task; one that has lost a token is drawn anew."""
        task_id, token = result.task_id, result.token
        if task_id not in self._asked or token is None:
            return
        drawn = self._tokens.setdefault(task_id, [])
        if token.logprob is None or result.index != len(drawn):
            self.failed(task_id)
            return
        drawn.append(token.token)
        self._logprobs.setdefault(task_id, []).append(token.logprob)
        if result.finish is not None:
            self._asked.remove(task_id)
            self._finished.add(task_id)

    def failed(self, task_id: str) -> None:
        """Note that a task under way will not come back: it is asked again, with the same outcome."""
        self._asked.discard(task_id)
        self._tokens.pop(task_id, None)
        self._logprobs.pop(task_id, None)

    def _sampling(self, task_id: str) -> Sampling:
        return Sampling(
            max_tokens=min(MAX_NEW_TOKENS, self._max_tokens - len(self._prompts[task_id])),
            seed=list(self._prompts).index(task_id),
            stop_token_ids=self._stop_token_ids,
            num_logprobs=0,
        )
