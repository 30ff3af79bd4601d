"""Complete responses as `score` takes them: checked, in a scorer's tokens, cut into steps, and in batches. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..checks import ROUNDING, integer
from ..steps import StepRule
from ..tokens import TokenText, encode_text
from ..tree import Prompt

Steps = StepRule | Sequence[Sequence[int]] | None


class Reader(Protocol):
    """The part of a scorer that reading a response needs; see ScorerBase."""

    @property
    def token_text(self) -> TokenText: ...

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def vocab(self) -> int | None: ...

    @property
    def context(self) -> int | None: ...

    def need_tokenizer(self) -> Any: ...

    def encode_prompt(self, prompt: Prompt) -> tuple[int, ...]: ...


@dataclass(frozen=True, eq=False)
class Response:
    """A response and its prompt, in a scorer's tokens.

    Attributes:
        prompt_ids: its prompt.
        token_ids: the response, [T >= 1].
        ends: response tokens up to each step's end, rising; the last is T.
        logprobs: [T] fp32, nats: log-probabilities that are known already; None for none.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    ends: tuple[int, ...]
    logprobs: np.ndarray | None = None


def read_responses(
    scorer: Reader,
    prompts: Iterable[Any],
    responses: Iterable[Any],
    *,
    steps: Steps = None,
    append_eos: bool | Sequence[bool] = True,
    logprobs: Sequence[Any] | None = None,
) -> list[Response]:
    """Check and encode prompts and responses. Arguments and errors as in ScorerBase.score."""
    prompts, responses = _listed("prompts", prompts), _listed("responses", responses)
    count = len(responses)
    if len(prompts) != count:
        raise ValueError(f"prompts has {len(prompts)} entries and responses {count}: one prompt a response is needed")
    known_logprobs = None if logprobs is None else _listed("logprobs", logprobs)
    close = [append_eos] * count if isinstance(append_eos, bool | np.bool_) else _listed("append_eos", append_eos)
    for name, items in (("append_eos", close), ("logprobs", known_logprobs)):
        if items is not None and len(items) != count:
            raise ValueError(f"{name} has {len(items)} entries for {count} responses")
    for place, flag in enumerate(close):
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(f"append_eos[{place}]={flag!r:.80}: True or False is needed")
    ids = [_response_ids(scorer, place, response, bool(close[place])) for place, response in enumerate(responses)]
    ends = _step_ends(scorer, ids, steps)
    read = []
    for place, prompt in enumerate(prompts):
        prompt_ids = _prompt_ids(scorer, place, prompt)
        _check_vocabulary(scorer, f"prompts[{place}]", prompt_ids)
        _check_vocabulary(scorer, f"responses[{place}]", ids[place])
        _check_context(scorer, place, len(prompt_ids) + len(ids[place]))
        known = None if known_logprobs is None else _logprobs(place, known_logprobs[place], len(ids[place]))
        read.append(Response(prompt_ids, tuple(ids[place]), ends[place], known))
    return read


def batches(responses: Sequence[Response], batch_tokens: int) -> Iterator[list[int]]:
    """Places of responses to be scored together: equal prompts side by side, each prompt counted once.

    Args:
        responses: what is to be scored.
        batch_tokens: tokens of a batch; one response may have more.
    """
    integer("batch_tokens", batch_tokens, 1, "at least 1 token, a whole number,")
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for place, response in enumerate(responses):
        by_prompt.setdefault(response.prompt_ids, []).append(place)
    batch: list[int] = []
    size = 0
    for prompt_ids, places in by_prompt.items():
        size += len(prompt_ids)
        for place in places:
            tokens = len(responses[place].token_ids)
            if batch and size + tokens > batch_tokens:
                yield batch
                batch, size = [], 0
            batch.append(place)
            size += tokens
    if batch:
        yield batch


def _listed(name: str, items: Any) -> list[Any]:
    if isinstance(items, str | bytes | Prompt) or not isinstance(items, Iterable):
        raise TypeError(f"{name} must be a list, one entry a response, got {type(items).__name__}: wrap it in a list")
    return list(items)


def _plain(items: Any) -> Any:
    """Arrays and tensors as lists."""
    return items.tolist() if hasattr(items, "tolist") else items


def _integers(items: Any) -> bool:
    return all(isinstance(item, int | np.integer) and not isinstance(item, bool) for item in items)


def _response_ids(scorer: Reader, place: int, response: Any, close: bool) -> list[int]:
    name = f"responses[{place}]"
    if isinstance(response, str):
        tokenizer, eos = scorer.need_tokenizer(), scorer.eos_token_id if close else None
        if eos is not None:  # the one control token that a text may spell, at its end: it is there already
            response = response.removesuffix(scorer.token_text.piece(eos).decode("utf-8", "replace"))
        ids = encode_text(tokenizer, response, scorer.token_text)
        if eos is not None:
            ids.append(eos)
    else:
        items = _plain(response)
        if not isinstance(items, Iterable) or isinstance(items, dict):
            raise TypeError(f"{name} must be a text or token ids, got {type(response).__name__}")
        items = list(items)
        if not _integers(items):
            raise TypeError(f"{name} must be a text or a flat list of token ids, got {response!r:.80}")
        ids = [int(item) for item in items]
    if not ids:
        raise ValueError(f"{name} is empty: at least one token is needed")
    return ids


def _prompt_ids(scorer: Reader, place: int, prompt: Any) -> tuple[int, ...]:
    try:
        return scorer.encode_prompt(Prompt.of(_plain(prompt)))
    except (ValueError, TypeError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"prompts[{place}]: {error}") from error


def _check_context(scorer: Reader, place: int, tokens: int) -> None:
    limit = scorer.context
    if limit is not None and tokens > limit:
        raise ValueError(
            f"responses[{place}]: {tokens} tokens with its prompt exceed the pair's context of {limit} tokens"
        )


def _check_vocabulary(scorer: Reader, name: str, ids: Sequence[int]) -> None:
    vocab = scorer.vocab
    if vocab is not None and not 0 <= min(ids) <= max(ids) < vocab:
        raise ValueError(f"{name}: token ids {min(ids)}..{max(ids)} lie outside the vocabulary of {vocab}")


def _step_ends(scorer: Reader, ids: Sequence[Sequence[int]], steps: Steps) -> list[tuple[int, ...]]:
    if steps is None or isinstance(steps, StepRule):
        rule = steps or StepRule()
        return [tuple(rule.ends(response, scorer.token_text.piece)) for response in ids]
    if isinstance(steps, str) or not isinstance(steps, Sequence):
        raise TypeError(f"steps must be a StepRule or one list of step ends a response, got {type(steps).__name__}")
    if len(steps) != len(ids):
        raise ValueError(f"steps has {len(steps)} lists of step ends for {len(ids)} responses")
    read = []
    for place, (ends, response) in enumerate(zip(steps, ids, strict=True)):
        ends = _plain(ends)
        if not isinstance(ends, Sequence) or not _integers(ends):
            raise TypeError(f"steps[{place}]={ends!r:.80}: a list of integers is needed, token counts up to step ends")
        rising = all(a < b for a, b in zip([0, *ends], ends, strict=False))
        if not rising or not len(ends) or ends[-1] != len(response):
            raise ValueError(
                f"steps[{place}]={list(ends)}: token counts that rise from above 0 to the response's "
                f"{len(response)} tokens are needed"
            )
        read.append(tuple(int(end) for end in ends))
    return read


def _logprobs(place: int, values: Any, tokens: int) -> np.ndarray:
    name = f"logprobs[{place}]"
    try:
        with np.errstate(over="ignore"):
            known = np.asarray(values, np.float32)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be numbers, one a token, got {values!r:.80}") from error
    if known.shape != (tokens,):
        raise ValueError(f"{name} has shape {known.shape} for a response of {tokens} tokens")
    if np.isnan(known).any():
        raise ValueError(f"{name} holds NaN: log-probabilities are needed, finite and <= 0 nats")
    odd = ~np.isfinite(known) | (known > ROUNDING)
    if odd.any():
        at = int(odd.argmax())
        raise ValueError(f"{name}[{at}]={known[at]}: a log-probability is needed, finite and <= 0 nats")
    return known
