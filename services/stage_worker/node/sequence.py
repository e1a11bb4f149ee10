"""A request on its node, from its arrival to its end."""

from dataclasses import dataclass, field

from shared.messages.inference import InferenceTask, SequenceStart


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """A request on its node, waiting for KV cache or running in it."""

    number: int
    """Its name on the node, in the order of arrival."""
    task: InferenceTask
    deadline_s: float
    traceparent: str
    blocks: list[int] = field(default_factory=list)
    num_told_blocks: int = 0
    """The stages know so many of its blocks."""
    num_cached: int = 0
    """Rows of the sequence whose keys and values are in the cache, or on their way there."""
    generated: list[int] = field(default_factory=list)
    has_begun: bool = False
    """The stages know it."""
    version: int | None = None
    """Weights version that it runs with to its end; None: the one that is published."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and those generated."""
        return len(self.task.prompt) + len(self.generated)

    @property
    def num_left(self) -> int:
        """Rows that are not in the cache yet; none while the next one depends on a token on its way."""
        return self.num_tokens - self.num_cached

    @property
    def is_decoding(self) -> bool:
        """Only its newest token is left."""
        return bool(self.generated) and self.num_left <= 1

    def next_tokens(self, num_rows: int) -> tuple[int, ...]:
        """Token ids of the next rows."""
        prompt, start = self.task.prompt, self.num_cached
        end, num_prompt = start + num_rows, len(self.task.prompt)
        if end <= num_prompt:
            return prompt[start:end]
        return prompt[start:] + tuple(self.generated[max(0, start - num_prompt) : end - num_prompt])

    def as_start(self) -> SequenceStart:
        """Register it on the stages."""
        task = self.task
        needs_prompt = task.prompt_logprobs or task.sampling.reads_prompt
        return SequenceStart(
            sequence=self.number,
            task_id=task.task_id,
            gateway=task.gateway,
            sampling=task.sampling,
            num_prompt_tokens=len(task.prompt),
            prompt=task.prompt if needs_prompt else (),
            prompt_logprobs=task.prompt_logprobs,
            traceparent=self.traceparent,
        )

    @property
    def start_bytes(self) -> int:
        """About the bytes that the variable part of its start takes in a message."""
        task, sampling = self.task, self.task.sampling
        num_bytes = len((sampling.grammar or "").encode())
        num_bytes += 16 * len(sampling.logit_bias) + 8 * len(sampling.stop_token_ids)
        if task.prompt_logprobs or sampling.reads_prompt:
            num_bytes += 5 * len(task.prompt)
        return num_bytes
