"""A judge's questions to a server: one token is drawn behind each text, for the likeliest ones told with it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

from ...next_token import NextToken, check_words, spelled_word, sum_words
from ...policy import RequestFailed
from .client import Counts, Endpoint, Route, deltas
from .facts import ServerFacts
from .retry import described

Tops = tuple[tuple[str, float], ...]


async def ask_words(
    asks: Sequence[NextToken],
    words: Sequence[str],
    *,
    endpoint: Endpoint,
    facts: ServerFacts,
    content: Callable[[NextToken], tuple[Route, dict[str, Any]]],
    model: str,
) -> list[dict[str, float]]:
    """Log-probabilities of words behind each ask, nats; see PolicyBase.next_token_logprobs. Equal texts are asked once.

    Args:
        asks, words: see PolicyBase.next_token_logprobs.
        endpoint, facts: the server.
        content: the route, and the prompt or messages, of an ask.
        model: id under which tokens are counted.

    Raises:
        RequestFailed: the server refused, or failed as often as it was tried.
    """
    known = check_words(words)
    tables: dict[str, asyncio.Task[Tops]] = {}
    keys = []
    for ask in asks:
        route, body = content(ask)
        key = json.dumps([route, body], sort_keys=True)
        keys.append(key)
        if key not in tables:
            tables[key] = asyncio.create_task(_tops(route, body, ask, endpoint, facts, model))
    try:
        told = dict(zip(tables, await asyncio.gather(*tables.values()), strict=True))
    except BaseException:
        for task in tables.values():
            task.cancel()
        await asyncio.gather(*tables.values(), return_exceptions=True)
        raise
    return [sum_words([(spelled_word(token), value) for token, value in told[key]], known) for key in keys]


async def _tops(
    route: Route, content: dict[str, Any], ask: NextToken, endpoint: Endpoint, facts: ServerFacts, model: str
) -> Tops:
    """The likeliest tokens behind one text."""
    known = facts.completions if route == "completions" else facts.chat
    count = 0 if known is None else known.tops
    limit = "max_tokens" if route == "completions" else facts.limit_field
    told = {"logprobs": count} if route == "completions" else {"logprobs": True, "top_logprobs": count}
    try:
        answer = await endpoint.ask(route, {**content, limit: 1, "temperature": 0, **told})
    except Exception as error:
        raise RequestFailed(f"{endpoint.base_url}: {described(error)}") from error
    counts = Counts.of(getattr(answer, "usage", None))
    if counts.prompt is not None:
        ask.tree.meter.add("encoded", model, counts.prompt - counts.cached)
        ask.tree.meter.add("cached", model, counts.cached)
    tokens = [token for delta in deltas(route, answer) for token in delta.tokens or ()]
    return tokens[0].tops if tokens else ()
