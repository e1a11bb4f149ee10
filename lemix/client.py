"""A small client of the public HTTP API, for the demo and the benchmarks.

It sees what any client sees; nothing here knows of the bus.
"""

import itertools
import json
import re
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from shared.errors import LemixError

CONNECT_TIMEOUT_S = 5.0


class ApiError(LemixError):
    """The API refused a request, broke off, or could not be reached; the message says why."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion, as it arrived."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    ttft_s: float
    """From sending the request to its first token."""
    tbt_s: tuple[float, ...]
    """Between each token and the next."""
    weights_versions: tuple[int, int]
    """The versions of the first and of the last token."""


@dataclass(frozen=True, slots=True)
class Score:
    """How well the model predicts a text."""

    nll_sum: float
    """Negative log-likelihood of all tokens but the first, in nats."""
    num_tokens: int
    """How many tokens that is."""


class ApiClient:
    """An async context manager around one HTTP connection pool."""

    def __init__(
        self,
        base_url: str,
        *,
        model: str,
        timeout_s: float = 120.0,
        tls: ssl.SSLContext | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(
            base_url=base_url,
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
            verify=tls or True,
            transport=transport,
        )
        self._model = model

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def complete(self, prompt: str | list[int], *, max_tokens: int, **parameters: Any) -> Completion:
        """Stream one completion and time its tokens. Raises ApiError."""
        body = {"prompt": prompt, "max_tokens": max_tokens, **parameters}
        return await self._stream("/v1/completions", body)

    async def chat(self, message: str, *, max_tokens: int, **parameters: Any) -> Completion:
        """Stream the answer to one message of a user and time its tokens. Raises ApiError."""
        messages = [{"role": "user", "content": message}]
        body = {"messages": messages, "max_completion_tokens": max_tokens, **parameters}
        return await self._stream("/v1/chat/completions", body)

    async def score(self, text: str) -> Score:
        """The likelihood of `text` under the weights being served. Raises ApiError."""
        body = {
            "model": self._model,
            "prompt": text,
            "max_tokens": 0,
            "echo": True,
            "logprobs": 0,
        }
        try:
            response = await self._http.post("/v1/completions", json=body)
        except httpx.HTTPError as error:
            raise ApiError(f"no answer from the API: {type(error).__name__} {error}") from error
        if response.status_code != 200:
            raise ApiError(_refusal(response))
        known = [lp for lp in response.json()["choices"][0]["logprobs"]["token_logprobs"] if lp is not None]
        return Score(nll_sum=-sum(known), num_tokens=len(known))

    async def _stream(self, path: str, parameters: dict[str, Any]) -> Completion:
        body = {"model": self._model, "stream": True, "stream_options": {"include_usage": True}, **parameters}
        stream = _Stream(time.monotonic())
        async for event in self._events(path, body):
            stream.take(event, time.monotonic())
        return stream.completion()

    async def _events(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        try:
            async with self._http.stream("POST", path, json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise ApiError(_refusal(response))
                async for line in response.aiter_lines():
                    data = line.removeprefix("data:").strip()
                    if line.startswith("data:") and data != "[DONE]":
                        yield json.loads(data)
        except httpx.HTTPError as error:
            raise ApiError(f"the stream broke off: {type(error).__name__} {error}") from error


async def served_model(base_url: str, tls: ssl.SSLContext | None = None) -> str:
    """The id of the model that the API serves. Raises ApiError."""
    try:
        async with httpx.AsyncClient(
            base_url=base_url, timeout=CONNECT_TIMEOUT_S, trust_env=False, verify=tls or True
        ) as http:
            response = await http.get("/v1/models")
    except httpx.HTTPError as error:
        raise ApiError(f"no answer from {base_url}: {type(error).__name__} {error}") from error
    if response.status_code != 200:
        raise ApiError(_refusal(response))
    name: str = response.json()["data"][0]["id"]
    return name


def _refusal(response: httpx.Response) -> str:
    try:
        reason = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        reason = response.text.strip()
    return f"HTTP {response.status_code}: {reason}"


def _versions(fingerprint: str) -> tuple[int, int]:
    """The API names the weights of the first and the last token as `weights-<first>-<last>`."""
    found = re.fullmatch(r"weights-(\d+)-(\d+)", fingerprint)
    if found is None:
        raise ApiError(f"the answer does not say which weights made it: {fingerprint!r}")
    return int(found[1]), int(found[2])


def _text_of(choice: dict[str, Any]) -> str:
    """The new text of one choice, in an event of a completion or of a chat."""
    text: str | None = choice["delta"].get("content") if "delta" in choice else choice["text"]
    return text or ""


class _Stream:
    """Collects the events of one streamed completion."""

    def __init__(self, sent_s: float) -> None:
        self._sent_s = sent_s
        self._arrivals_s: list[float] = []
        self._texts: list[str] = []
        self._finish_reason = ""
        self._usage: dict[str, Any] = {}
        self._fingerprint = ""

    def take(self, event: dict[str, Any], now_s: float) -> None:
        if "error" in event:
            raise ApiError(str(event["error"].get("message", event["error"])))
        self._usage = event.get("usage") or self._usage
        self._fingerprint = event.get("system_fingerprint") or self._fingerprint
        for choice in event.get("choices", ()):
            if text := _text_of(choice):
                self._arrivals_s.append(now_s)
                self._texts.append(text)
            self._finish_reason = choice.get("finish_reason") or self._finish_reason

    def completion(self) -> Completion:
        if not self._finish_reason:
            raise ApiError("the stream ended before its completion did")
        times = self._arrivals_s
        return Completion(
            text="".join(self._texts),
            finish_reason=self._finish_reason,
            prompt_tokens=self._usage["prompt_tokens"],
            completion_tokens=self._usage["completion_tokens"],
            ttft_s=(times[0] if times else time.monotonic()) - self._sent_s,
            tbt_s=tuple(later - earlier for earlier, later in itertools.pairwise(times)),
            weights_versions=_versions(self._fingerprint),
        )
