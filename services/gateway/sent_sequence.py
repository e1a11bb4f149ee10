"""One sequence of a request on its way, and how it is sent again when its node is gone. Pure."""

from dataclasses import dataclass, field

from msgspec import structs

from shared.messages.inference import RUN_OBJECTIVE, InferenceTask, Objective, Sampling, SequenceResult

MAX_TRIES = 3
"""Nodes that a sequence is sent to, one after the other."""
NODE_LOST = 503
"""The code of a failure that is the node's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSpec:
    """One sequence to complete."""

    prompt: tuple[int, ...]
    sampling: Sampling
    prompt_logprobs: bool = False
    objective: Objective = RUN_OBJECTIVE


@dataclass(slots=True)
class SentSequence:
    """A sequence as it was asked for, and what has come of it."""

    spec: SequenceSpec
    task_id: str = ""
    """The task that it is now."""
    num_tries: int = 0
    given: list[int] = field(default_factory=list)
    """Its tokens so far."""
    is_scored: bool = False
    """Log-probabilities of its prompt have come."""
    lost_because: str = ""
    """Why the last node did not finish it; empty: there was none."""
    is_torn: bool = False
    """A part of it was lost on its way."""

    def note(self, result: SequenceResult) -> None:
        """Take in what has come; what comes twice counts once."""
        self.is_scored = self.is_scored or bool(result.prompt)
        self.is_torn = self.is_torn or result.index > len(self.given)
        if result.token is not None and result.index == len(self.given):
            self.given.append(result.token.token)

    def can_go_on(self, *, may_mix_weights: bool) -> bool:
        """Whether another node can go on with it so that nobody notices.

        A prompt that is scored in part is not: all of it would be scored again. `may_mix_weights`: its tokens
        may come from different weights.
        """
        if self.num_tries >= MAX_TRIES or self.is_torn:
            return False
        return may_mix_weights if self.given else not self.is_scored

    def next_task(self, task_id: str, *, gateway: str, waited_s: float, timeout_s: float) -> InferenceTask:
        """The task by which the next node begins with it, or goes on behind the tokens so far."""
        self.task_id = task_id
        self.num_tries += 1
        spec, given = self.spec, tuple(self.given)
        objective = spec.objective
        if self.num_tries > 1:  # whoever has waited for a node that died is not refused for being late
            objective = structs.replace(objective, when_late="serve_last")
        return InferenceTask(
            task_id=task_id,
            gateway=gateway,
            prompt=spec.prompt + given,
            sampling=spec.sampling,
            prompt_logprobs=spec.prompt_logprobs and not given,
            timeout_s=timeout_s,
            objective=objective,
            waited_s=waited_s,
            num_given=len(given),
        )
