"""The parameters of all routes that generate: how long, how often, and how tokens are drawn."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from services.gateway.context import GatewayContext
from services.gateway.openai.models import check_model
from services.gateway.openai.objective import ObjectiveParameters
from services.gateway.openai.schema import AS_WHOLE, RequestModel, Whole, at_most, invalid
from shared.messages.inference import Sampling

MAX_STOPS = 16
MAX_BIASED_TOKENS = 300
MAX_STOP_TOKENS = 64


def _as_stops(value: object) -> object:
    """One stop string or several, as a list. An empty one never stops anything."""
    stops = [value] if isinstance(value, str) else value
    return [stop for stop in stops if stop != ""] if isinstance(stops, list) else stops


StopList = Annotated[list[str], Field(max_length=MAX_STOPS)]
TokenId = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
TokenLimit = Annotated[int, Field(ge=0), AS_WHOLE]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1), AS_WHOLE]
Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(RequestModel):
    """How a stream is sent."""

    include_usage: bool = False
    """Count the tokens in a last event."""
    continuous_usage_stats: bool = False
    """Count them in all events, so far; only with `include_usage`."""
    include_obfuscation: bool = False
    """Accepted; events carry no padding."""

    @property
    def counts_always(self) -> bool:
        """Whether each event counts the tokens so far."""
        return self.include_usage and self.continuous_usage_stats


class GenerationParameters(ObjectiveParameters):
    """The parameters of generated text that every request may have."""

    model: str
    n: Whole = Field(default=1, ge=1)
    max_tokens: TokenLimit | None = None
    max_completion_tokens: TokenLimit | None = None
    stop: Annotated[StopList, BeforeValidator(_as_stops, json_schema_input_type=str | StopList)] = Field(
        default_factory=list
    )
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: Whole = Field(default=0, ge=-1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    logit_bias: Annotated[dict[TokenId, Bias], at_most(MAX_BIASED_TOKENS)] = Field(
        default_factory=dict,
        max_length=MAX_BIASED_TOKENS,
        json_schema_extra={"additionalProperties": False},
    )
    seed: Seed | None = None
    ignore_eos: bool = False
    store: bool = False
    """Remember the answer, so that it can be corrected."""
    min_tokens: Whole = Field(default=0, ge=0)
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=list, max_length=MAX_STOP_TOKENS
    )

    @property
    def token_limit(self) -> int | None:
        """How many tokens to generate at most; None: the route's default. Raises ApiError."""
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise invalid("max_completion_tokens", "'max_tokens' is given too, with another value")
        return limits.pop() if limits else None


def check_parameters(asked: GenerationParameters, context: GatewayContext, *, num_prompts: int = 1) -> None:
    """Raises ApiError when the served model or the settings do not allow what is asked for."""
    card, settings = context.card, context.settings
    check_model(asked.model, card)
    num_choices = num_prompts * asked.n
    if num_choices > settings.max_choices:
        reason = f"{num_choices} choices (prompts times n), at most {settings.max_choices} are allowed"
        raise invalid("n" if asked.n > 1 else "prompt", reason)
    if any(len(stop) > settings.max_stop_length for stop in asked.stop):
        raise invalid("stop", f"at most {settings.max_stop_length} characters are allowed")
    for name, tokens in (
        ("logit_bias", map(int, asked.logit_bias)),
        ("stop_token_ids", asked.stop_token_ids),
    ):
        wrong = next((token for token in tokens if token >= card.vocab_size), None)
        if wrong is not None:
            raise invalid(name, f"token id {wrong}: the vocabulary has {card.vocab_size} tokens")


def sampling_of(
    asked: GenerationParameters,
    context: GatewayContext,
    *,
    max_tokens: int,
    num_logprobs: int | None,
    grammar: str | None = None,
) -> Sampling:
    """How to draw the tokens of the first choice.

    Raises ApiError when fewer tokens are allowed than are wanted at least.
    """
    if asked.min_tokens > max_tokens:
        raise invalid("min_tokens", f"at most {max_tokens} tokens are allowed")
    end_tokens = () if asked.ignore_eos else context.card.eos_token_ids
    return Sampling(
        max_tokens=max_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=min(max(asked.top_k, 0), context.card.vocab_size),
        min_p=asked.min_p,
        frequency_penalty=asked.frequency_penalty,
        presence_penalty=asked.presence_penalty,
        repetition_penalty=asked.repetition_penalty,
        logit_bias=tuple((int(token), bias) for token, bias in asked.logit_bias.items()),
        grammar=grammar,
        seed=context.ids.seed() if asked.seed is None else asked.seed,
        stop_token_ids=tuple(dict.fromkeys((*end_tokens, *asked.stop_token_ids))),
        min_tokens=asked.min_tokens,
        num_logprobs=num_logprobs,
    )
