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
from shared.slices import TRAINING_TURN
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


class Objective(Message):
    """The times that a client expects of its answer; None: those of the run."""

    ttft_s: PositiveFloat | None = None
    """From its arrival to its first token."""
    tbt_s: PositiveFloat | None = None
    """Between two of its tokens."""
    when_late: Literal["refuse", "serve_last"] | None = None
    """Where it cannot have its first token in time any more."""
    priority: int = 0
    """Lower goes first."""


RUN_OBJECTIVE = Objective()


class Pace(Message):
    """The room that a request's objective for the time between tokens leaves to others on its node."""

    rows_beside_decodes: PositiveInt | None = None
    """Rows of prompts that an iteration with decodes has at most while the request is in it; None: as many as
    there is room for."""
    training_turn: NonNegativeFloat = TRAINING_TURN
    """How long training goes on at least after it gave way to an iteration with the request, in lengths of
    that (see `shared.slices`)."""


OWN_PACE = Pace()


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
    num_given: Count = 0
    """So many of the prompt's last tokens were drawn by a node that is gone: this one goes on behind them as
    if it had drawn them itself. They count in `max_tokens`."""

    @property
    def most_tokens(self) -> int:
        """The length that the sequence may grow to, prompt included."""
        return len(self.prompt) + max(0, self.sampling.max_tokens - self.num_given)

    objective: Objective = RUN_OBJECTIVE
    pace: Pace = OWN_PACE
    """The scheduler sets it."""
    waited_s: NonNegativeFloat = 0.0
    """How long the request had been at its gateway when this was sent first."""


class Placed(Message):
    """The scheduler's answer: the node that the task went to."""

    node: int
    offload: bool = False
    """Training only: stages keep what they save for its backwards in host memory."""
    ttft_s: PositiveFloat | None = None
    """Inference only: its first token is due so long after its arrival, by its own objective or the run's."""
    tbt_s: PositiveFloat | None = None
    """Inference only: and the next ones so long after each other; None: nobody has said so."""


DEFERRED = "deferred"
"""How the reason begins when a task is refused (503) only for now: whoever can wait asks again."""


class CancelTask(Message):
    """The client is gone, or has seen enough: free the task's work. gateway -> stage 0."""

    task_id: str


class SequenceStart(Message):
    """The facts about a sequence that hold until it ends. Every stage is told once, and keeps them."""

    sequence: Count
    """Its number on the node, by which iterations call it."""
    task_id: str
    gateway: GatewayId
    sampling: Sampling
    num_prompt_tokens: PositiveInt
    prompt: tuple[int, ...] = ()
    """The prompt where the last stage needs it: to score it, or to draw (`Sampling.reads_prompt`)."""
    prompt_logprobs: bool = False
    """The prompt is scored."""
    given: tuple[int, ...] = ()
    """Tokens that another node has drawn: they stand behind the prompt's."""
    traceparent: str = ""


class NewBlocks(Message, array_like=True):
    """KV-cache blocks that a sequence has got since its last rows."""

    place: Count
    """Which sequence of the iteration has got them."""
    first: Count
    """How many of the sequence's blocks come before them; it has no others behind."""
    blocks: tuple[Count, ...]


class Iteration(Message):
    """One forward of a mixed set of sequences, as all stages of a node are told of it.

    `sequences`, `starts`, `counts` and `produces` are columns: an entry for each sequence, in the order of
    the rows. Raises ValueError when they differ in length, or blocks are those of none of them.
    """

    number: Count
    sequences: tuple[Count, ...]
    """By their numbers."""
    starts: tuple[Count, ...]
    """The position of the first row in its sequence."""
    counts: tuple[PositiveInt, ...]
    """Rows: a piece of a prompt, or the newest token."""
    produces: tuple[bool, ...]
    """The last row is the sequence's newest: a token follows from it (none if max_tokens is 0)."""
    begins: tuple[SequenceStart, ...] = ()
    """Sequences that have their first rows here."""
    new_blocks: tuple[NewBlocks, ...] = ()
    left: tuple[int, ...] = ()
    """Sequences that are over since the last iteration: all stages forget them."""
    version: int | None = None
    """The weights version to run with; None: each stage's newest."""
    deferrable: bool = False
    """All other work overtakes it."""
    training_turn: NonNegativeFloat = TRAINING_TURN
    """The least of its sequences (see `Pace`)."""

    def __post_init__(self) -> None:
        columns = (self.sequences, self.starts, self.counts, self.produces)
        if len({len(column) for column in columns}) > 1:
            raise ValueError("the columns of an iteration differ in length")
        if any(new.place >= len(self.sequences) for new in self.new_blocks):
            raise ValueError("new blocks are those of no sequence of the iteration")


class IterationForward(Message):
    """One iteration on its way through a node. stage s -> stage s+1."""

    iteration: Iteration
    hidden: TensorRef
    """[rows, hidden_size]."""
    weights_version: int | None = None
    """The version with which all stages so far have run it; None: with different ones."""


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
    num_cached: Count = 0
    """Prompt tokens that others had computed before (told with the first token)."""
    finish: FinishReason | None = None


class TokensProduced(Message):
    """New tokens for the sequences of one gateway. last stage -> gateway."""

    node: int
    weights_version: int
    results: tuple[SequenceResult, ...]


class SampledToken(Message, array_like=True):
    """A new token as stage 0 needs it."""

    sequence: int
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
    weights_version: int | None = None
    """The version with which all stages have run it; None: with different ones, or not all of them."""
    lost: str = ""
    """Why a stage had to drop it on the way; empty: it came through."""
    pipeline_stands: bool = False
    """It was dropped for a reason of its own: no other is lost with it."""


class TaskEnded(Message):
    """The tasks no longer occupy their node. stage 0 or trainer -> scheduler."""

    task_ids: tuple[str, ...]
