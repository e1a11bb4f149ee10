"""From a completion request to sequences, and from their tokens to the pieces of an answer."""

import asyncio
from collections.abc import Callable

from opentelemetry.trace import SpanKind

from services.gateway.cluster_client import Arrival
from services.gateway.context import GatewayContext
from services.gateway.http.errors import ApiError, ClientGoneError, as_api_error
from services.gateway.openai import answers
from services.gateway.openai.choices import sequences_of, specs_of
from services.gateway.openai.requests import CompletionRequest, parse_request
from services.gateway.record import Record
from services.gateway.text.detokenise import Piece
from services.gateway.text.tokenise import TokenisedPrompt, check_limits, tokenise
from shared.errors import LemixError
from shared.telemetry import traceparent_of

REFUSALS_WITHIN_S = 1.0
"""A node that cannot take a sequence says so at once: after this time it has taken it."""


class Completions:
    """Takes requests in: counts them, checks them, and begins to answer them."""

    def __init__(self, context: GatewayContext) -> None:
        self._context = context
        self._num_running = 0

    async def begin(self, body: bytes, *, traceparent: str = "") -> "Completion":
        """Start to answer a request; the caller ends it with `Completion.close`.

        Raises ApiError when the request cannot be honoured as it stands.
        """
        arrived_s = self._context.clock.now_s()
        self._num_running += 1
        try:
            request, prompts = await self._read(body)
        except BaseException:
            self._leave()
            self._context.metrics.requests.labels("refused").inc()
            raise
        return Completion(
            self._context,
            request,
            prompts,
            arrived_s=arrived_s,
            traceparent=traceparent,
            on_close=self._leave,
        )

    async def _read(self, body: bytes) -> tuple[CompletionRequest, list[TokenisedPrompt]]:
        context = self._context
        if self._num_running > context.settings.max_concurrent_requests:
            raise ApiError(429, "too many requests at once", code="rate_limit_exceeded")
        request = parse_request(body)
        check_limits(request, context.card, context.settings)
        return request, await tokenise(request, context.tokenizer, context.card)

    def _leave(self) -> None:
        self._num_running -= 1


class Completion:
    """One request being answered: `next` until `finished`, then `close`."""

    def __init__(
        self,
        context: GatewayContext,
        request: CompletionRequest,
        prompts: list[TokenisedPrompt],
        *,
        arrived_s: float,
        traceparent: str,
        on_close: Callable[[], None],
    ) -> None:
        self.request = request
        self.heading = answers.Heading(
            completion_id=context.ids.new("cmpl"),
            created_s=int(context.clock.wall_s()),
            model=context.card.name,
        )
        self.versions: tuple[int, int] | None = None
        """Weights of the first and of the last token so far; None before any."""
        self._clock = context.clock
        self._on_close = on_close
        self._error: LemixError | None = None
        self._closed = False
        self._num_prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        self._sequences = sequences_of(request, prompts, context.tokenizer)
        self._num_open = len(self._sequences)
        seed = context.ids.seed() if request.seed is None else request.seed
        specs = specs_of(request, prompts, context.card, seed)
        span = context.telemetry.span(
            "gateway.completion",
            traceparent=traceparent,
            kind=SpanKind.SERVER,
            attributes={"gen_ai.request.max_tokens": request.max_tokens},
        )
        self._record = Record(
            context.metrics,
            span,
            arrived_s=arrived_s,
            num_choices=self._num_open,
            on_first_tokens=context.on_first_tokens,
        )
        self._session = context.cluster.submit(specs, traceparent=traceparent_of(span))

    @property
    def finished(self) -> bool:
        """Every choice is complete."""
        return self._num_open == 0

    @property
    def usage(self) -> answers.Json:
        """Tokens so far, in OpenAI's words; a prompt counts once whatever its `n`."""
        return answers.usage(self._num_prompt_tokens, self._record.num_tokens)

    async def first(self) -> list[tuple[int, Piece]]:
        """Wait until the nodes have taken the request; what there is to show by then, maybe nothing.

        Raises what `next` raises: until then a refusal can still have its HTTP status.
        """
        await self._session.admitted()
        try:
            async with asyncio.timeout(REFUSALS_WITHIN_S):
                return await self.next()
        except TimeoutError:
            return []

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
