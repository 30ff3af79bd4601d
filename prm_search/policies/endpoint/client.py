"""The HTTP side of a policy: OpenAI's asynchronous client, one an event loop, and its chunks as plain records."""

from __future__ import annotations

import asyncio
import math
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal
from weakref import WeakKeyDictionary

from .retry import Backoff, http_library, retried

Route = Literal["completions", "chat"]
OPENAI = "https://api.openai.com/v1"
NEEDS = "OpenAIPolicy needs more packages ({}): pip install 'prm-search[openai]'"
_ESCAPED = re.compile(r"bytes:((?:\\x[0-9a-fA-F]{2})+)")
_REPLACED = "\ufffd"


@dataclass(frozen=True)
class ServerToken:
    """A token as a server tells it with its log-probability.

    Attributes:
        data: the bytes it spells; None where the server does not say them, as of half a character.
        logprob: nats; NaN where it is not told.
        tops: text and log-probability of the likeliest tokens in its place, the likeliest first; empty where they are
            not told.
    """

    data: bytes | None
    logprob: float = math.nan
    tops: tuple[tuple[str, float], ...] = ()

    def confidence(self, count: int) -> float | None:
        """See Node.confidences, over so many of the likeliest tokens; None where none is told."""
        told = [value for _, value in self.tops[:count]]
        return -sum(told) / len(told) if told else None


@dataclass(frozen=True)
class Delta:
    """The part of a chunk that one choice gets.

    Attributes:
        index: of the choice.
        text: added text.
        tokens: added tokens; None where the server tells none.
        token_ids: ids of the added tokens; None where the server tells none.
        finish: why the choice ended; None while it goes on.
        stop_reason: the stop string that ended it, or a token; None where the server does not say, or for its end.
    """

    index: int
    text: str
    tokens: tuple[ServerToken, ...] | None = None
    token_ids: tuple[int, ...] | None = None
    finish: str | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True)
class Counts:
    """Tokens that a server counts for a request. None where it says nothing, or nothing that can be."""

    prompt: int | None = None
    completion: int | None = None
    cached: int = 0

    @classmethod
    def of(cls, usage: Any) -> Counts:
        """The counts of a response or a chunk; none without a usage."""
        details = getattr(usage, "prompt_tokens_details", None)
        prompt = _count(getattr(usage, "prompt_tokens", None))
        cached = _count(getattr(details, "cached_tokens", None)) or 0
        return cls(prompt, _count(getattr(usage, "completion_tokens", None)), min(cached, prompt or 0))


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


class Endpoint:
    """A model behind a server.

    Args:
        base_url: up to and with `/v1`; None for the client's own default.
        model: as the server calls it.
        api_key: None for the variable OPENAI_API_KEY, else none.
        concurrency: requests at a time, of all searches together.
        timeout: seconds without a byte from the server.
        backoff, sleep: see retry.
        headers: of every request.

    Attributes:
        calls: requests made so far, tries counted.

    Raises:
        ImportError: the package openai is missing.
    """

    def __init__(
        self,
        base_url: str | None,
        model: str,
        *,
        api_key: str | None,
        concurrency: int,
        timeout: float,
        backoff: Backoff,
        sleep: Callable[[float], Awaitable[Any]],
        headers: Mapping[str, str] | None,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise ImportError(NEEDS.format(error.name)) from error
        self.base_url = (base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI).rstrip("/")
        self._options: dict[str, Any] = {
            "base_url": self.base_url,
            "api_key": api_key or os.environ.get("OPENAI_API_KEY") or "none",
            "timeout": openai.Timeout(timeout, connect=min(timeout, 30.0)),
            "max_retries": 0,
            "default_headers": dict(headers or {}),
        }
        self.model, self.concurrency, self.backoff, self._sleep = model, concurrency, backoff, sleep
        self.calls = 0
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[Any, asyncio.Semaphore, Any]]
        self._clients = WeakKeyDictionary()

    def _here(self) -> tuple[Any, asyncio.Semaphore]:
        """The running loop's client and what limits its requests: connections belong to one loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            import openai

            http_client = openai.DefaultAsyncHttpxClient(verify=certificates(), timeout=self._options["timeout"])
            client = openai.AsyncOpenAI(**self._options, http_client=http_client)
            self._clients[loop] = client, asyncio.Semaphore(self.concurrency), http_client
        client, limit, _ = self._clients[loop]
        return client, limit

    async def close(self) -> None:
        """Close the connections of the running loop."""
        client, *_ = self._clients.pop(asyncio.get_running_loop(), (None, None, None))
        if client is not None:
            await client.close()

    async def models(self) -> list[Any]:
        """The server's list of models."""
        client, _ = self._here()
        page = await self.retried(client.models.list)
        return list(page.data or ())

    async def ask(self, route: Route, body: Mapping[str, Any]) -> Any:
        """The response to a request that is not streamed, tried as often as the backoff says."""
        return await self.retried(lambda: self.create(route, body))

    async def retried(
        self, attempt: Callable[[], Awaitable[Any]], luck: Callable[[int], float] = lambda tried: 0.5
    ) -> Any:
        """Return what an attempt returns; see retry.retried. A wait holds no place among the requests at a time."""
        return await retried(lambda: self._limited(attempt), self.backoff, self._sleep, luck)

    async def _limited(self, attempt: Callable[[], Awaitable[Any]]) -> Any:
        _, limit = self._here()
        async with limit:
            self.calls += 1
            return await attempt()

    async def create(self, route: Route, body: Mapping[str, Any], *, stream: bool = False) -> Any:
        """The response to one try."""
        client, _ = self._here()
        create = client.completions.create if route == "completions" else client.chat.completions.create
        content = "prompt" if route == "completions" else "messages"
        own = {name: value for name, value in body.items() if name != content}
        return await create(model=self.model, **{content: body[content]}, stream=stream, extra_body=own)

    @asynccontextmanager
    async def stream(self, route: Route, body: Mapping[str, Any]) -> AsyncIterator[AsyncIterator[Any]]:
        """The chunks of one streamed try. Leaving the block closes the connection, which ends the request."""
        response = await self.create(route, body, stream=True)
        try:
            yield response
        finally:
            await response.close()

    async def forward(self, path: str, content: bytes) -> Any:
        """The server's own response to a body of JSON, of which nothing has been read yet; close it by `aclose`.

        Args:
            path: behind the base URL.
            content: the body.

        Raises:
            TransportError: of retry.http_library: the server cannot be reached.
        """
        self._here()
        _, limit, http_client = self._clients[asyncio.get_running_loop()]
        headers = {"Authorization": f"Bearer {self._options['api_key']}", "Content-Type": "application/json"}
        request = http_client.build_request(
            "POST", self.base_url + path, content=content, headers=headers | self._options["default_headers"]
        )
        async with limit:
            self.calls += 1
            return await http_client.send(request, stream=True)


@cache
def certificates() -> Any:
    """The certificates that servers are checked by. They take a quarter of a second to read."""
    return http_library().create_ssl_context()


def deltas(route: Route, chunk: Any) -> Iterator[Delta]:
    """The parts of a chunk, or of a whole response, by choice."""
    for choice in chunk.choices or ():
        if route == "completions":
            text = choice.text or ""
        else:
            message = getattr(choice, "delta", None) or getattr(choice, "message", None)
            text = getattr(message, "content", None) or ""
        ids = getattr(choice, "token_ids", None)
        yield Delta(
            int(choice.index or 0),
            text,
            _tokens(route, getattr(choice, "logprobs", None)),
            None if ids is None else tuple(map(int, ids)),
            choice.finish_reason,
            getattr(choice, "stop_reason", None),
        )


def _tokens(route: Route, logprobs: Any) -> tuple[ServerToken, ...] | None:
    if logprobs is None:
        return None
    if route == "chat":
        return tuple(map(_chat_token, getattr(logprobs, "content", None) or ()))
    told: list[Any] = list(getattr(logprobs, "tokens", None) or ())
    values: list[Any] = list(getattr(logprobs, "token_logprobs", None) or ())
    tops: list[Any] = list(getattr(logprobs, "top_logprobs", None) or ())
    values += [None] * (len(told) - len(values))
    tops += [None] * (len(told) - len(tops))
    return tuple(
        ServerToken(_spelt(token), _nats(value), _tops((top or {}).items()))
        for token, value, top in zip(told, values, tops, strict=False)
    )


def _chat_token(entry: Any) -> ServerToken:
    data = getattr(entry, "bytes", None)
    told = bytes(data) if data is not None else _spelt(entry.token)
    tops = _tops((other.token, other.logprob) for other in entry.top_logprobs or ())
    return ServerToken(told, _nats(entry.logprob), tops)


def _spelt(token: str) -> bytes | None:
    """Bytes of a token's text; None where it shows only that they are no text."""
    escaped = _ESCAPED.fullmatch(token)
    if escaped is not None:
        return bytes.fromhex(escaped[1].replace("\\x", ""))
    return None if _REPLACED in token else token.encode("utf-8", "replace")


def _nats(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _tops(told: Iterable[tuple[str, Any]]) -> tuple[tuple[str, float], ...]:
    known = [(token, float(value)) for token, value in told if isinstance(value, int | float) and not math.isnan(value)]
    return tuple(sorted(known, key=lambda entry: -entry[1]))
