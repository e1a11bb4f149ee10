"""How the last stage draws the tokens of a sequence, from its first one to its end."""

from collections import Counter
from dataclasses import dataclass, field

from services.stage_worker.compute.sampling.grammar import Grammar
from shared.messages.inference import FinishReason, Sampling


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
