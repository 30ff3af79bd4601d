"""Retries: which errors of a server pass, and how long to wait for that."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib import import_module
from time import time
from typing import Any, TypeVar

from ...checks import integer, number

T = TypeVar("T")
PASSING = frozenset({408, 409, 425, 429})  # statuses that may be others next time, beside all from 500 on


class Cut(ConnectionError):
    """A stream that ended before its choices did."""


@dataclass(frozen=True)
class Backoff:
    """Exponential waits, with jitter, between tries of one request.

    Tried again is what is met by 408, 409, 425, 429 or 5xx, takes too long, or loses its connection. A server that says
    how long to wait (`Retry-After`) is obeyed up to `longest`.

    Args:
        tries: of one request, the first included.
        first: seconds before the second try; doubled each time.
        longest: seconds that one wait may take.

    Raises:
        ValueError, TypeError: a number is out of range.
    """

    tries: int = 8
    first: float = 0.5
    longest: float = 60.0

    def __post_init__(self) -> None:
        integer("tries", self.tries, 1, "a number of tries >= 1")
        for name in ("first", "longest"):
            number(name, getattr(self, name), "seconds >= 0", lambda seconds: 0 <= seconds < math.inf)

    def delay(self, tried: int, error: Exception, luck: float) -> float:
        """Seconds to wait.

        Args:
            tried: times that it has been tried, >= 1.
            error: the last one's.
            luck: in [0, 1), where in the second half of the wait to go on.
        """
        told = retry_after(error)
        if told is not None:
            return min(told, self.longest)
        return min(self.first * 2.0 ** (tried - 1), self.longest) * (0.5 + 0.5 * luck)


def http_library() -> Any:
    """The library that the client speaks HTTP with: httpx, or its successor, as the version of openai has it."""
    import openai

    modules = (base.__module__.partition(".")[0] for base in openai.DefaultAsyncHttpxClient.__mro__)
    return import_module(next(name for name in modules if name != "openai"))


def passes(error: Exception) -> bool:
    """Return True if the same request may succeed later."""
    import openai

    if isinstance(error, openai.APIStatusError):
        return error.status_code in PASSING or error.status_code >= 500
    if isinstance(error, openai.APIResponseValidationError):
        return False
    # A plain APIError is one that came in the middle of a stream.
    return isinstance(error, openai.APIError | http_library().TransportError | Cut)


def retry_after(error: Exception) -> float | None:
    """Seconds that a server asks to wait, by its header `Retry-After` (seconds or a date) or `retry-after-ms`."""
    headers = getattr(getattr(error, "response", None), "headers", None)
    if headers is None:
        return None
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        if 0 <= seconds < math.inf:
            return seconds
    try:
        return max(parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time(), 0.0)
    except (TypeError, ValueError):
        return None


async def retried(
    attempt: Callable[[], Awaitable[T]],
    backoff: Backoff,
    sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    luck: Callable[[int], float] = lambda tried: 0.5,
) -> T:
    """Return what `attempt` returns, after as many tries as that takes.

    Args:
        attempt: tries once.
        backoff: how often, and the waits.
        sleep: waits some seconds.
        luck: jitter after so many tries; see Backoff.delay.

    Raises:
        Exception: the last try's, or one that would come again.
    """
    tried = 0
    while True:
        tried += 1
        try:
            return await attempt()
        except Exception as error:
            if tried >= backoff.tries or not passes(error):
                raise
            wait = backoff.delay(tried, error, luck(tried))
        await sleep(wait)


def described(error: BaseException) -> str:
    """Return what an error of the server says, on one line."""
    import openai

    body = getattr(error, "body", None)
    told = body.get("message") if isinstance(body, dict) else None
    message = str(told or error).strip() or type(error).__name__
    status = f"HTTP {error.status_code}: " if isinstance(error, openai.APIStatusError) else ""
    cause = "" if error.__cause__ is None or status else f" ({error.__cause__})"
    return " ".join(f"{status}{message}{cause}".split())[:500]
