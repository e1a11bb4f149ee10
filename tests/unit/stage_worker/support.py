"""What the stage worker's unit tests share."""

from itertools import count
from typing import Any

from services.stage_worker.node.sequence import Sequence
from shared.messages.inference import InferenceTask, Sampling

_numbers = count()


def task(
    task_id: str = "a", *, prompt_length: int = 3, max_tokens: int = 4, first: int = 0, **fields: Any
) -> InferenceTask:
    """A request whose prompt is `first`, 1, 2, ..."""
    return InferenceTask(
        task_id=task_id,
        gateway="g",
        prompt=(first, *range(1, prompt_length))[:prompt_length],
        sampling=Sampling(max_tokens=max_tokens),
        timeout_s=1.0,
        **fields,
    )


def sequence(
    task_id: str = "a", *, prompt_length: int = 3, max_tokens: int = 4, num_cached: int = 0, first: int = 0
) -> Sequence:
    """A sequence that is not in flight; it has a token to go on from when its prompt is cached."""
    generated = [100] if num_cached >= prompt_length else []
    return Sequence(
        number=next(_numbers),
        task=task(task_id, prompt_length=prompt_length, max_tokens=max_tokens, first=first),
        deadline_s=1.0,
        traceparent="",
        num_cached=num_cached,
        generated=generated,
    )
