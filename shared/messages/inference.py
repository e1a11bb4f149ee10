"""Messages of a request's life: submitted, placed, run in iterations, answered."""

from typing import Annotated, Literal

from msgspec import Meta

from shared.messages.base import Message
from shared.messages.bounds import (
    Count,
    FiniteFloat,
    GatewayId,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
    Share,
)
from shared.tensors.ref import TensorRef

FinishReason = Literal["stop", "length"]


class Sampling(Message):
    """How tokens of one sequence are drawn."""

    max_tokens: Count
    temperature: NonNegativeFloat = 1.0
    """0 means greedy."""
    top_p: PositiveShare = 1.0
    top_k: Count = 0
    """Draw from so many of the likeliest tokens; 0: from all."""
    min_p: Share = 0.0
    """Draw from tokens with at least this share of the likeliest token's probability."""
    frequency_penalty: FiniteFloat = 0.0
    """Taken off a token's logit for each time it was generated."""
    presence_penalty: FiniteFloat = 0.0
    """Taken off the logit of each token that was generated."""
    repetition_penalty: PositiveFloat = 1.0
    """Divides the positive logits of tokens in the prompt or generated, multiplies the negative ones."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the logits of these tokens."""
    grammar: str | None = None
    """The text must follow this grammar (see `shared/structured_output.py`); None: any text."""
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: Count = 0
    """No stop token is drawn before so many tokens were."""
    num_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    """None: no log-probabilities; k: the chosen token's and the k likeliest."""

    @property
    def has_penalties(self) -> bool:
        """Whether a draw depends on the tokens drawn before."""
        return bool(self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1)

    @property
    def reads_prompt(self) -> bool:
        """Whether a draw depends on the prompt's tokens."""
        return self.repetition_penalty != 1


class InferenceTask(Message):
    """One sequence to complete. gateway -> scheduler -> stage 0 of the chosen node."""

    task_id: str
    gateway: GatewayId
    """Id of the gateway that waits for the tokens."""
    prompt: tuple[int, ...]
    """Stage 0 refuses what the model has no words for."""
    sampling: Sampling
    prompt_logprobs: bool = False
    """Also return the log-probability of every prompt token but the first."""
    timeout_s: PositiveFloat
    """The task fails with a clear error when it is older than this."""
    deferrable: bool = False
    """It runs only where nothing else would, in iterations of its own."""
    weights_version: int | None = None
    """The version to run with, which the stages keep; None: the one that is served."""


class Placed(Message):
    """The scheduler's answer: the node that the task went to."""

    node: int
    offload: bool = False
    """Training only: stages keep what they save for its backwards in host memory."""


DEFERRED = "deferred"
"""How the reason begins when a task is refused (503) only for now: whoever can wait asks again."""


class CancelTask(Message):
    """The client is gone, or has seen enough: free the task's work. gateway -> stage 0."""

    task_id: str


class SequenceStart(Message):
    """The facts about a sequence that the last stage needs, and keeps until it ends or leaves."""

    gateway: GatewayId
    sampling: Sampling


class SequenceChunk(Message):
    """The rows of one sequence in one iteration: a piece of its prompt, or its newest token."""

    task_id: str
    begins: SequenceStart | None = None
    """In the sequence's first chunk only."""
    start: Count
    """Position of the first row in the sequence."""
    num_tokens: PositiveInt
    blocks: tuple[int, ...]
    """KV-cache blocks of the sequence, in order, up to the chunk's last row at least."""
    produces: bool
    """The chunk's last row is the sequence's newest: a token follows from it (none if max_tokens is 0)."""
    index: Count = 0
    """How many tokens the sequence has produced before this one."""
    targets: tuple[int, ...] = ()
    """Prompt tokens that follow the chunk's rows, when their log-probabilities are wanted."""
    tokens: tuple[int, ...] = ()
    """Prompt tokens of the chunk's rows, when draws depend on them (`Sampling.reads_prompt`)."""
    traceparent: str = ""


class IterationForward(Message):
    """One iteration on its way through a node. stage s -> stage s+1."""

    iteration: int
    chunks: tuple[SequenceChunk, ...]
    left: tuple[str, ...] = ()
    """Tasks that were removed before their end since the last iteration: the last stage forgets them."""
    hidden: TensorRef
    """[rows, hidden_size]."""
    version: int | None = None
    """The weights version to run with; None: each stage's newest."""
    deferrable: bool = False
    """All other work overtakes it."""


class TokenLogprob(Message):
    """A token with its log-probability and the likeliest tokens there (token, log-probability)."""

    token: int
    logprob: float | None = None
    """None when no log-probabilities were asked for."""
    top: tuple[tuple[int, float], ...] = ()


class SequenceResult(Message):
    """The tokens that one iteration produced for one sequence."""

    task_id: str
    prompt: tuple[TokenLogprob, ...] = ()
    """Log-probabilities of the prompt tokens that this chunk predicts."""
    token: TokenLogprob | None = None
    """The new token."""
    index: int = 0
    """How many tokens the sequence has produced before this result: a lost one is noticed by it."""
    finish: FinishReason | None = None


class TokensProduced(Message):
    """New tokens for the sequences of one gateway. last stage -> gateway."""

    node: int
    weights_version: int
    results: tuple[SequenceResult, ...]


class SampledToken(Message):
    """A new token as stage 0 needs it."""

    task_id: str
    token: int | None
    """None: none was asked for (finished), or it could not be drawn yet: the same row must come again."""
    finished: bool


class TaskFailed(Message):
    """The task ends without its full answer; `code` is an HTTP status. -> gateway."""

    task_id: str
    code: int
    reason: str


class IterationDone(Message):
    """An iteration has left the last stage, or was lost on its way there. later stages -> stage 0."""

    iteration: int
    tokens: tuple[SampledToken, ...] = ()
    failed: tuple[TaskFailed, ...] = ()
    """Tasks that cannot go on, for a reason of their own."""
    lost: str = ""
    """Why a stage had to drop it on the way; empty: it came through."""
    pipeline_stands: bool = False
    """It was dropped for a reason of its own: no other is lost with it."""


class TaskEnded(Message):
    """The tasks no longer occupy their node. stage 0 or trainer -> scheduler."""

    task_ids: tuple[str, ...]
