"""The losses of one weights version on sets of examples: results in, prompts to score out."""

from collections.abc import Iterable, Sequence

from shared.encoding import LabelledTokens
from shared.messages.inference import SequenceResult

MAX_ASKED = 16
"""Examples that a node is asked to score at once."""


class Evaluation:
    """One pass over all examples; each is scored by one task, named after it."""

    def __init__(self, name: str, *sets: Sequence[LabelledTokens]) -> None:
        """`name` is this pass's alone."""
        self._sets = [
            [f"{name}-{place}-{number}" for number in range(len(s))] for place, s in enumerate(sets)
        ]
        examples = [example for each in sets for example in each]
        self._examples = dict(
            zip((task_id for each in self._sets for task_id in each), examples, strict=True)
        )
        self._unasked = list(reversed(self._examples))
        self._asked: set[str] = set()
        self._scores: dict[str, float] = {}
        """Negative log-likelihoods, in nats."""

    @property
    def asked(self) -> Iterable[str]:
        """Tasks that are under way."""
        return self._asked

    @property
    def losses(self) -> list[float | None] | None:
        """Mean loss per learnt token of each set (None: it is empty), in nats, once all is scored."""
        if self._asked or self._unasked:
            return None
        return [self._mean_loss(each) if each else None for each in self._sets]

    def next(self) -> dict[str, tuple[int, ...]]:
        """The next prompts to score, by task."""
        task_ids = [self._unasked.pop() for _ in range(min(len(self._unasked), MAX_ASKED - len(self._asked)))]
        self._asked.update(task_ids)
        return {task_id: self._examples[task_id].tokens for task_id in task_ids}

    def scored(self, result: SequenceResult) -> bool:
        """Take the result of a task; False when it is not under way, or is not whole: see `failed`."""
        example = self._examples.get(result.task_id)
        if example is None or result.task_id not in self._asked:
            return False
        logprobs = [token.logprob for token in result.prompt]
        wanted = [logprobs[row] for row in example.label_rows if row < len(logprobs)]
        known = [logprob for logprob in wanted if logprob is not None]
        if len(known) < len(example.label_rows):
            self.failed(result.task_id)
            return False
        self._asked.remove(result.task_id)
        self._scores[result.task_id] = -sum(known)
        return True

    def failed(self, task_id: str) -> None:
        """Note that a task under way will not come back: it is asked again."""
        if task_id in self._asked:
            self._asked.remove(task_id)
            self._unasked.append(task_id)

    def _mean_loss(self, task_ids: Sequence[str]) -> float:
        num_labels = sum(len(self._examples[task_id].label_rows) for task_id in task_ids)
        return sum(self._scores[task_id] for task_id in task_ids) / num_labels
