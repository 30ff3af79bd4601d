"""Log-probabilities of given tokens from a vLLM engine that keeps using its prefix cache. Imports no vLLM itself.

vLLM skips the prefix cache for requests that want prompt log-probabilities, since it has no hidden rows for cached
tokens. A step search wants them only of the tokens after its parent, so it may read the cache if it looks out for
itself (V1: skip_reading_prefix_cache=False). Of a prompt with tokens [0, P) of which [0, c) were cached, the rows of
tokens c+1 .. P-1 are true; what stands before them is uninitialised memory under V1 and nothing under Model Runner V2.
So for wanted tokens [p, P):

1. rows are read from the end, and only those wanted;
2. they are believed only where c <= p - 1. Of a sequence that was encoded for another search c > p may hold: that is
   encoded again in full;
3. where c == p, a block of the cache ends with the parent. Then only the log-probability of token p is missing. It is
   that of a *next* token, so it is asked as such: `logprob_token_ids` after the parent, one request for all of its
   children, which costs one block instead of the whole path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CANDIDATES = 19  # of one Next: over HTTP vLLM takes max_logprobs=20 by default, one of which may be left out


@dataclass(frozen=True)
class SpanRequest:
    """The log-probabilities of token_ids[start:], each after all before it; 1 <= start < len(token_ids).

    Attributes:
        cached: whether the prefix cache may be read.
    """

    token_ids: tuple[int, ...]
    start: int
    cached: bool = True


@dataclass(frozen=True)
class NextTokenRequest:
    """The log-probabilities of candidates for the token after token_ids, at most CANDIDATES distinct ones."""

    token_ids: tuple[int, ...]
    candidates: tuple[int, ...]


Ask = SpanRequest | NextTokenRequest


@dataclass
class LogprobAnswer:
    """An engine's answer.

    Attributes:
        logprobs: [N] float32, nats, of a Span's tokens or a Next's candidates; NaN where the engine had none.
        cached: tokens of the prompt that it had cached.
    """

    logprobs: np.ndarray
    cached: int


def fields(ask: Ask, *, v2: bool) -> dict[str, Any]:
    """SamplingParams of an ask, by name. One token is drawn, since vLLM draws no less, and thrown away."""
    common: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
    if isinstance(ask, NextTokenRequest):
        return common | {"logprob_token_ids": list(ask.candidates)}
    common["skip_reading_prefix_cache"] = not ask.cached
    if v2:
        wanted = [[token] for token in ask.token_ids[ask.start :]]
        return common | {"prompt_logprob_token_ids": wanted, "prompt_logprob_start": ask.start - 1}
    return common | {"prompt_logprobs": 0, "flat_logprobs": True}


def http_fields(ask: Ask, *, v2: bool) -> dict[str, Any]:
    """The same for /inference/v1/generate, which answers with the drawn token and then logprobs - 1 of those asked for:
    one more is asked, so that none is left out that matters."""
    body = fields(ask, v2=v2)
    if isinstance(ask, NextTokenRequest):
        spare = next(i for i in range(len(ask.candidates) + 1) if i not in ask.candidates)
        body |= {"logprobs": len(ask.candidates) + 1, "logprob_token_ids": [*ask.candidates, spare]}
    body.pop("flat_logprobs", None)
    return body


def read_output(ask: Ask, output: Any, *, v2: bool) -> LogprobAnswer:
    """The answer in a vLLM RequestOutput."""
    cached = int(output.num_cached_tokens or 0)
    if isinstance(ask, NextTokenRequest):
        (table,) = output.outputs[0].logprobs
        return LogprobAnswer(np.array([table[token].logprob for token in ask.candidates], np.float32), cached)
    if v2:
        return LogprobAnswer(_scores(ask, output.prompt_token_id_logprobs), cached)
    rows = output.prompt_logprobs
    return LogprobAnswer(_rows(ask, cached, rows, lambda row, token: row[token].logprob), cached)


def read_json(ask: Ask, body: Mapping[str, Any], scores: np.ndarray | None, *, v2: bool) -> LogprobAnswer:
    """The answer in the JSON of /inference/v1/generate.

    Args:
        scores: its prompt_token_id_logprobs, decoded.

    Raises:
        ValueError: the server does not say how much of the prompt it had cached.
    """
    details = body["usage"].get("prompt_tokens_details")
    cached = None if details is None else details.get("cached_tokens")
    if cached is None:
        if isinstance(ask, NextTokenRequest) or ask.cached:
            raise ValueError(
                "the server does not say how many tokens it had cached, without which its log-probabilities cannot be "
                "trusted: start it with --enable-prompt-tokens-details"
            )
        cached = 0
    if isinstance(ask, NextTokenRequest):
        (place,) = body["choices"][0]["logprobs"]["content"]
        table = {entry["token_id"]: entry["logprob"] for entry in place["top_logprobs"]}
        return LogprobAnswer(np.array([table[token] for token in ask.candidates], np.float32), cached)
    if v2:
        return LogprobAnswer(_scores(ask, scores), cached)
    return LogprobAnswer(
        _rows(ask, cached, body["prompt_logprobs"], lambda row, token: row[str(token)]["logprob"]), cached
    )


def _scores(ask: SpanRequest, scores: np.ndarray | None) -> np.ndarray:
    count = len(ask.token_ids) - ask.start
    if scores is None:  # the cache reached beyond the first row
        return np.full(count, np.nan, np.float32)
    return np.asarray(scores, np.float32).reshape(count)


def _rows(ask: SpanRequest, cached: int, rows: Any, logprob: Any) -> np.ndarray:
    total = len(ask.token_ids)
    logprobs = np.full(total - ask.start, np.nan, np.float32)
    for at in range(max(ask.start, cached + 1), total if rows else 0):
        logprobs[at - ask.start] = logprob(rows[at - total], ask.token_ids[at])
    return logprobs


def gaps(spans: Sequence[SpanRequest], answers: Sequence[LogprobAnswer]) -> list[tuple[Ask, list[int]]]:
    """Return what has to be asked again after the first answers: as little as the rules above allow.

    Returns:
        asks, each with the places of the spans that it serves; none where all is known.
    """
    again: list[tuple[Ask, list[int]]] = []
    heads: dict[tuple[int, ...], dict[int, list[int]]] = {}
    for place, (span, answer) in enumerate(zip(spans, answers, strict=True)):
        missing = np.isnan(answer.logprobs)
        if not missing.any():
            continue
        if answer.cached != span.start:
            again.append((whole(span), [place]))
            continue
        heads.setdefault(span.token_ids[: span.start], {}).setdefault(span.token_ids[span.start], []).append(place)
        if missing[1:].any():  # Model Runner V2 answers all or nothing
            again.append((SpanRequest(span.token_ids, span.start + 1), [place]))
    for prefix, places in heads.items():
        tokens = list(places)
        for i in range(0, len(tokens), CANDIDATES):
            part = tokens[i : i + CANDIDATES]
            again.append((NextTokenRequest(prefix, tuple(part)), [place for token in part for place in places[token]]))
    return again


def whole(span: SpanRequest) -> SpanRequest:
    """The span, encoded anew."""
    return SpanRequest(span.token_ids, span.start, cached=False)


def fill(
    spans: Sequence[SpanRequest],
    answers: Sequence[LogprobAnswer],
    repeats: Sequence[tuple[Ask, Sequence[int]]],
    repeat_answers: Sequence[LogprobAnswer],
) -> None:
    """Write what asking again brought into the answers of the spans."""
    for (ask, places), answer in zip(repeats, repeat_answers, strict=True):
        for place in places:
            values = answers[place].logprobs
            if isinstance(ask, SpanRequest):
                values[len(values) - len(answer.logprobs) :] = answer.logprobs
            else:
                values[0] = answer.logprobs[ask.candidates.index(spans[place].token_ids[spans[place].start])]
