"""A request on its node, from its arrival to its end."""

from dataclasses import dataclass, field

from services.stage_worker.node.prefix_cache import NOTHING, Key
from shared.messages.inference import InferenceTask, SequenceStart


@dataclass(slots=True, eq=False)
class HeldBlocks:
    """The KV-cache blocks of one sequence."""

    blocks: list[int] = field(default_factory=list)
    num_kept: int = 0
    """So many of them, from the first on, can be found by others (`PrefixCache`)."""
    last_name: int = NOTHING
    """The name of the last one of these."""
    version: int | None = None
    """The weights version of all rows so far; None: there are none."""
    is_mixed: bool = False
    """Rows were computed with different versions: no more blocks of it are kept."""
    promised: Key | None = None
    """The content that others wait for."""


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """A request on its node, waiting for KV cache or running in it."""

    number: int
    """Its name on the node, in the order of arrival."""
    task: InferenceTask
    deadline_s: float
    traceparent: str
    held: HeldBlocks = field(default_factory=HeldBlocks)
    num_known_blocks: int = 0
    """The stages know so many of its blocks."""
    num_cached: int = 0
    """Rows of the sequence whose keys and values are in the cache, or on their way there."""
    generated: list[int] = field(default_factory=list)
    has_run: bool = False
    """It has had blocks, maybe others than now."""
    has_begun: bool = False
    """The stages know it."""
    num_in_flight: int = 0
    """Iterations under way that have rows of it."""
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
    def is_unscored(self) -> bool:
        """All rows of its prompt have to run, once: their log-probabilities are wanted."""
        return self.task.prompt_logprobs and not self.generated

    @property
    def is_decoding(self) -> bool:
        """Only its newest token is left."""
        return bool(self.generated) and self.num_left <= 1

    def next_tokens(self, num_rows: int) -> tuple[int, ...]:
        """Token ids of the next rows."""
        return self.tokens(self.num_cached, self.num_cached + num_rows)

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """Token ids of these places, as far as they are known."""
        prompt, num_prompt = self.task.prompt, len(self.task.prompt)
        if end <= num_prompt:
            return prompt[start:end]
        return prompt[start:] + tuple(self.generated[max(0, start - num_prompt) : end - num_prompt])

    def as_start(self) -> SequenceStart:
        """Register it on the stages."""
        task = self.task
        num_prompt_tokens = len(task.prompt) - task.num_given
        needs_prompt = task.prompt_logprobs or task.sampling.reads_prompt
        return SequenceStart(
            sequence=self.number,
            task_id=task.task_id,
            gateway=task.gateway,
            sampling=task.sampling,
            num_prompt_tokens=num_prompt_tokens,
            prompt=task.prompt[:num_prompt_tokens] if needs_prompt else (),
            prompt_logprobs=task.prompt_logprobs,
            given=task.prompt[num_prompt_tokens:],
            traceparent=self.traceparent,
        )

    @property
    def start_bytes(self) -> int:
        """About the bytes that the variable part of its start takes in a message."""
        task, sampling = self.task, self.task.sampling
        num_bytes = len((sampling.grammar or "").encode())
        num_bytes += 16 * len(sampling.logit_bias) + 8 * len(sampling.stop_token_ids) + 5 * task.num_given
        if task.prompt_logprobs or sampling.reads_prompt:
            num_bytes += 5 * len(task.prompt)
        return num_bytes
