"""From a completion request to sequences, and from their tokens to the pieces of an answer."""

from collections.abc import Callable
from dataclasses import dataclass

from opentelemetry.trace import SpanKind

from services.gateway import answers
from services.gateway.choices import sequences_of, specs_of
from services.gateway.errors import ApiError, ClientGoneError, as_api_error
from services.gateway.metrics import Metrics
from services.gateway.openai_types import CompletionRequest, parse_request
from services.gateway.prompts import TokenisedPrompt, check_limits, tokenise
from services.gateway.record import FirstTokens, Record
from services.gateway.service import Arrival, Gateway
from services.gateway.sessions import Piece
from services.gateway.settings import GatewaySettings
from shared.clock import Clock, IdSource
from shared.errors import LemixError
from shared.model_files import ModelCard
from shared.telemetry import Telemetry, traceparent_of
from shared.text import TextTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolbox:
    """What completions are made with."""

    gateway: Gateway
    tokenizer: TextTokenizer
    card: ModelCard
    settings: GatewaySettings
    clock: Clock
    ids: IdSource
    metrics: Metrics
    telemetry: Telemetry
    on_first_tokens: Callable[[FirstTokens], None]
    """Is told when a request has its first tokens."""


class Completions:
    """Takes requests in: counts them, checks them, and begins to answer them."""

    def __init__(self, tools: Toolbox) -> None:
        self._tools = tools
        self._num_running = 0

    async def begin(self, body: bytes, *, traceparent: str = "") -> "Completion":
        """Start to answer a request; the caller ends it with `Completion.close`.

        Raises ApiError when the request cannot be honoured as it stands.
        """
        arrived_s = self._tools.clock.now_s()
        self._num_running += 1
        try:
            request, prompts = await self._read(body)
        except BaseException:
            self._leave()
            self._tools.metrics.requests.labels("refused").inc()
            raise
        return Completion(
            self._tools, request, prompts, arrived_s=arrived_s, traceparent=traceparent, on_close=self._leave
        )

    async def _read(self, body: bytes) -> tuple[CompletionRequest, list[TokenisedPrompt]]:
        tools = self._tools
        if self._num_running > tools.settings.max_concurrent_requests:
            raise ApiError(429, "too many requests at once", code="rate_limit_exceeded")
        request = parse_request(body)
        check_limits(request, tools.card, tools.settings)
        return request, await tokenise(request, tools.tokenizer, tools.card)

    def _leave(self) -> None:
        self._num_running -= 1


class Completion:
    """One request being answered: `next` until `finished`, then `close`."""

    def __init__(
        self,
        tools: Toolbox,
        request: CompletionRequest,
        prompts: list[TokenisedPrompt],
        *,
        arrived_s: float,
        traceparent: str,
        on_close: Callable[[], None],
    ) -> None:
        self.request = request
        self.heading = answers.Heading(
            completion_id=tools.ids.new("cmpl"), created_s=int(tools.clock.wall_s()), model=tools.card.name
        )
        self.versions: tuple[int, int] | None = None
        """Weights of the first and of the last token so far; None before any."""
        self._clock = tools.clock
        self._on_close = on_close
        self._error: LemixError | None = None
        self._closed = False
        self._num_prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        self._sequences = sequences_of(request, prompts, tools.tokenizer)
        self._num_open = len(self._sequences)
        seed = tools.ids.seed() if request.seed is None else request.seed
        specs = specs_of(request, prompts, tools.card, seed)
        span = tools.telemetry.span(
            "gateway.completion",
            traceparent=traceparent,
            kind=SpanKind.SERVER,
            attributes={"gen_ai.request.max_tokens": request.max_tokens},
        )
        self._record = Record(
            tools.metrics,
            span,
            arrived_s=arrived_s,
            num_choices=self._num_open,
            on_first_tokens=tools.on_first_tokens,
        )
        self._session = tools.gateway.submit(specs, traceparent=traceparent_of(span))

    @property
    def finished(self) -> bool:
        """Every choice is complete."""
        return self._num_open == 0

    @property
    def usage(self) -> answers.Json:
        """Tokens so far, in OpenAI's words; a prompt counts once whatever its `n`."""
        return answers.usage(self._num_prompt_tokens, self._record.num_tokens)

    async def next(self) -> list[tuple[int, Piece]]:
        """Wait for what can be shown next: pieces, each with the index of its choice.

        Raises ApiError when no complete answer will come, ClientGoneError after `fail` said so.
        """
        try:
            arrivals = await self._session.next()
            return [piece for arrival in arrivals if (piece := self._take(arrival)) is not None]
        except ClientGoneError as error:
            self._error = error
            raise
        except LemixError as error:
            self._error = error
            raise as_api_error(error) from error

    def fail(self, error: LemixError) -> None:
        """End with `error`."""
        self._session.fail(error)

    def close(self) -> None:
        """Free what is left of the work, and record how it went; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._session.close()
        self._on_close()
        error = None if self.finished else self._error or ClientGoneError("nobody waited for the answer")
        self._record.end(at_s=self._clock.now_s(), num_prompt_tokens=self._num_prompt_tokens, error=error)

    def _take(self, arrival: Arrival) -> tuple[int, Piece] | None:
        """What an arrival adds; None for a repeated one, or after a stop string has ended its choice."""
        index = arrival.place
        sequence = self._sequences[index]
        if sequence.finished or sequence.repeats(arrival.result):
            return None
        if arrival.result.token is not None:
            self._record.token(index, arrival.at_s, arrival.node)
        piece = sequence.apply(arrival.result)
        self._see_version(arrival.weights_version)
        if piece.finish is not None:
            self._num_open -= 1
            if arrival.result.finish is None:
                self._session.stop(index)
        return index, piece

    def _see_version(self, version: int) -> None:
        first = version if self.versions is None else self.versions[0]
        self.versions = (first, version)
