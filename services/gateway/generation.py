"""Generation: from the prompts of one request to the text of its sequences. Knows no route.

A route turns its request into a `GenerationRequest`, and what `Generation.next` gives into its answer.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from msgspec import structs
from opentelemetry.trace import SpanKind

from services.gateway.access.keys import Key, ServiceClass
from services.gateway.access.meter import Meter
from services.gateway.cluster_client import SUBMIT_TIMEOUT_S, Arrival
from services.gateway.context import GatewayContext
from services.gateway.http.errors import ApiError, ClientGoneError, RefusedFor, as_api_error
from services.gateway.record import Record
from services.gateway.sent_sequence import SequenceSpec
from services.gateway.text.detokenise import Detokeniser, Piece
from services.gateway.text.tokenise import TokenisedPrompt
from services.gateway.version_ranges import TokenVersions
from shared.errors import LemixError
from shared.messages.inference import RUN_OBJECTIVE, Objective, Sampling
from shared.telemetry import traceparent_of
from shared.text import TextTokenizer

IN_LINE_AFTER_S = SUBMIT_TIMEOUT_S + 2.0
"""A request without a node after this time has not been refused: it stands in the scheduler's line."""
REFUSALS_WITHIN_S = 1.0
"""A node that cannot take a sequence says so at once: after this time it has taken it."""

_NUM_SEEDS = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """The client on whose behalf a generation runs."""

    traceparent: str = ""
    meter: Meter | None = None
    """The meter of the key that asked; None: there are no keys."""
    key: Key | None = None
    """That key."""

    @property
    def service_class(self) -> ServiceClass:
        """The class of the key; without keys, all are interactive."""
        return "interactive" if self.key is None else self.key.service_class


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """Which sequences to generate, and how."""

    answer_id: str
    """Names the answer, in it and on its span."""
    prompts: tuple[TokenisedPrompt, ...]
    sampling: Sampling
    """How the first choice of a prompt is drawn; the k-th after it draws with `seed` + k."""
    num_choices: int = 1
    """Choices for each prompt."""
    stops: tuple[str, ...] = ()
    service_class: ServiceClass = "interactive"
    objective: Objective = RUN_OBJECTIVE
    """The times that every choice is to keep."""
    echo: bool = False
    """Show the prompt before the text, with its log-probabilities if there are any."""


class Versions(NamedTuple):
    """Weights of the first and of the last token so far."""

    first: int
    last: int


class Usage(NamedTuple):
    """Tokens of a request so far; a prompt counts once, however many choices it has."""

    num_prompt_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int = 0
    """Tokens of prompts that had been computed for other requests."""


class Generations:
    """Begins generations, and counts the requests that are refused before."""

    def __init__(self, context: GatewayContext) -> None:
        self._context = context

    @contextmanager
    def admitted(self, caller: Caller) -> "Iterator[Callable[[GenerationRequest], Generation]]":
        """For the block in which a request is read: what begins it, as the block's last act.

        The caller ends the generation with `Generation.close`. An error in the block refuses the
        request.
        """
        context, arrived_s = self._context, self._context.clock.now_s()
        try:
            yield partial(Generation, context, arrived_s=arrived_s, caller=caller)
        except BaseException as error:
            reason: RefusedFor = error.refused_for if isinstance(error, ApiError) else "gateway"
            context.metrics.refused(reason, caller.service_class)
            raise


class Generation:
    """The sequences of one request: `next` until `finished`, then `close`."""

    def __init__(
        self,
        context: GatewayContext,
        request: GenerationRequest,
        *,
        arrived_s: float,
        caller: Caller,
    ) -> None:
        """Raises ApiError (429) when the caller's key has no tokens left."""
        self.versions: Versions | None = None
        """None before any token."""
        self._clock = context.clock
        self._error: LemixError | None = None
        self._closed = False
        self._num_prompt_tokens = sum(len(prompt.ids) for prompt in request.prompts)
        self._meter = caller.meter
        if self._meter is not None:
            self._meter.count_prompt(self._num_prompt_tokens)
        self._num_choices = request.num_choices
        self._num_cached: dict[int, int] = {}
        """By prompt: tokens that even its first choice found computed."""
        self._sequences = detokenisers_of(request, context.tokenizer)
        self._num_open = len(self._sequences)
        self._token_versions = [TokenVersions() for _ in self._sequences]
        span = context.telemetry.span(
            "gateway.completion",
            traceparent=caller.traceparent,
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.request.max_tokens": request.sampling.max_tokens,
                "gen_ai.response.id": request.answer_id,
            },
        )
        self._record = Record(
            context.metrics,
            span,
            arrived_s=arrived_s,
            num_choices=self._num_open,
            service_class=request.service_class,
            on_first_tokens=context.on_first_tokens,
        )
        self._session = context.cluster.submit(
            specs_of(request), arrived_s=arrived_s, traceparent=traceparent_of(span)
        )

    @property
    def finished(self) -> bool:
        """Whether every sequence is complete."""
        return self._num_open == 0

    @property
    def usage(self) -> Usage:
        """The tokens so far."""
        return Usage(self._num_prompt_tokens, self._record.num_tokens, sum(self._num_cached.values()))

    async def first(self) -> list[tuple[int, Piece]]:
        """Wait until the nodes have taken the sequences, or some of them stand in line.

        Returns what there is to show by then, maybe nothing. Raises what `next` raises: until then a refusal
        can still have its HTTP status.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(IN_LINE_AFTER_S):
                await self._session.admitted()
        try:
            async with asyncio.timeout(REFUSALS_WITHIN_S):
                return await self.next()
        except TimeoutError:
            return []

    async def next(self) -> list[tuple[int, Piece]]:
        """Wait for what can be shown next: pieces, each with the index of its sequence; none after `wake`.

        Raises ApiError when no complete answer will come, ClientGoneError after `fail` said so.
        """
        try:
            arrivals = await self._session.next()
            return [piece for arrival in arrivals if (piece := self._take(arrival)) is not None]
        except ClientGoneError as error:
            self._error = error
            raise
        except LemixError as error:
            self._error = told = as_api_error(error)
            raise told from error

    async def rest(self) -> list[list[Piece]]:
        """Wait for the end: all pieces that are left, sequence by sequence. Raises what `next` raises."""
        pieces: list[list[Piece]] = [[] for _ in self._sequences]
        while not self.finished:
            for index, piece in await self.next():
                pieces[index].append(piece)
        return pieces

    def wake(self) -> None:
        """Let `next` return."""
        self._session.wake()

    def fail(self, error: LemixError) -> None:
        """End with `error`."""
        self._session.fail(error)

    def close(self) -> None:
        """Free what is left of the work, and record how it went; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._session.close()
        if self._meter is not None:
            self._meter.count_completion(self._record.num_tokens)
        error = None if self.finished else self._error or ClientGoneError("nobody waited for the answer")
        self._record.end(
            at_s=self._clock.now_s(),
            num_prompt_tokens=self._num_prompt_tokens,
            placed=self._session.placements,
            error=error,
        )

    def _take(self, arrival: Arrival) -> tuple[int, Piece] | None:
        """The piece that an arrival adds; None for a repeated one, or after its sequence has ended."""
        index = arrival.place
        sequence = self._sequences[index]
        if sequence.finished or sequence.repeats(arrival.result):
            return None
        if arrival.result.token is not None:
            self._record.token(index, arrival.at_s, arrival.node)
            self._token_versions[index].add(arrival.weights_version)
            if arrival.result.index == 0:
                self._see_cached(index // self._num_choices, arrival.result.num_cached)
        piece = sequence.apply(arrival.result)
        self._see_version(arrival.weights_version)
        if piece.finish is not None:
            piece = replace(piece, ranges=self._token_versions[index].ranges)
            self._num_open -= 1
            if arrival.result.finish is None:
                self._session.stop(index)
        return index, piece

    def _see_cached(self, prompt: int, num_tokens: int) -> None:
        self._num_cached[prompt] = min(num_tokens, self._num_cached.get(prompt, num_tokens))

    def _see_version(self, version: int) -> None:
        first = version if self.versions is None else self.versions.first
        self.versions = Versions(first, version)


def specs_of(request: GenerationRequest) -> list[SequenceSpec]:
    """The sequences to run: all choices of the first prompt, then those of the next."""
    sampling = request.sampling
    with_scores = request.echo and sampling.num_logprobs is not None
    choices = [
        structs.replace(sampling, seed=(sampling.seed + k) % _NUM_SEEDS) for k in range(request.num_choices)
    ]
    return [
        SequenceSpec(
            prompt=prompt.ids,
            sampling=choice,
            prompt_logprobs=with_scores,
            objective=request.objective,
        )
        for prompt in request.prompts
        for choice in choices
    ]


def detokenisers_of(request: GenerationRequest, tokenizer: TextTokenizer) -> list[Detokeniser]:
    """One detokeniser for each of the sequences, in the same order."""
    return [
        Detokeniser(
            tokenizer,
            prompt.ids,
            max_tokens=request.sampling.max_tokens,
            stops=request.stops,
            with_logprobs=request.sampling.num_logprobs is not None,
            echo=prompt.text if request.echo else None,
        )
        for prompt in request.prompts
        for _ in range(request.num_choices)
    ]
