"""Limits of what a server takes on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..checks import flag, integer, number


@dataclass(frozen=True)
class Limits:
    """Limits of one request, and of the number that are taken on.

    Args:
        searches: prompts searched at a time; beyond it requests get 429.
        body_bytes: of a request's body.
        max_tokens: of one response, and what a chat request that names no max_tokens gets.
        children: drawn at once for one prompt, as width * expansions, and any single option of a strategy.
        sampled_tokens: of one prompt's search, pruned ones included; a search that reaches it ends with what it has.
        seconds: of one prompt's search, after which the best of what it has is the answer.
        patterns: whether requests may have patterns as delimiters. Python's patterns can take for ever, and with them
            the server.
    """

    searches: int = 64
    body_bytes: int = 1 << 20
    max_tokens: int = 4096
    children: int = 256
    sampled_tokens: int = 1 << 20
    seconds: float = 600.0
    patterns: bool = False

    def __post_init__(self) -> None:
        for name in ("searches", "body_bytes", "max_tokens", "children", "sampled_tokens"):
            integer(name, getattr(self, name), 1, "an integer >= 1")
        number("seconds", self.seconds, "a finite number > 0", lambda seconds: 0 < seconds < math.inf)
        flag("patterns", self.patterns)
