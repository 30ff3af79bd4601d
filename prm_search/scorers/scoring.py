"""Scoring of complete responses: `ImplicitPRM.score`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..policies.hf import encode_prompt
from ..steps import StepRule
from ..tree import Node, Prompt, SearchTree
from .implicit.scores import Scores, text_pieces
from .retokenise import encode_text

if TYPE_CHECKING:
    from .implicit.implicit_prm import ImplicitPRM


def score_responses(
    pair: ImplicitPRM,
    prompts: Iterable[Any],
    responses: Iterable[Any],
    *,
    steps: StepRule | Sequence[Sequence[int]] | None = None,
    append_eos: bool | Sequence[bool] = True,
    logprobs: Sequence[Any] | None = None,
    batch_tokens: int = 1 << 15,
) -> list[Scores]:
    """See ImplicitPRM.score."""
    asked, given = _listed("prompts", prompts), _listed("responses", responses)
    if len(asked) != len(given):
        raise ValueError(
            f"prompts has {len(asked)} entries and responses {len(given)}: one prompt a response is needed"
        )
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens={batch_tokens!r}: at least 1 is needed")
    close = [bool(append_eos)] * len(given) if isinstance(append_eos, bool) else list(append_eos)
    for name, items in (("append_eos", close), ("logprobs", logprobs)):
        if items is not None and len(items) != len(given):
            raise ValueError(f"{name} has {len(items)} entries for {len(given)} responses")
    ids = [_response_ids(pair, i, response, close[i]) for i, response in enumerate(given)]
    ends = _step_ends(pair, ids, steps)

    trees: dict[tuple[int, ...], tuple[SearchTree, list[int]]] = {}  # equal prompts are one tree: their KV is shared
    for i, prompt in enumerate(asked):
        found = _prompt_ids(pair, i, prompt)
        _known_ids(pair, f"prompts[{i}]", found)
        _known_ids(pair, f"responses[{i}]", ids[i])
        _fits(pair, i, len(found) + len(ids[i]))
        trees.setdefault(found, (SearchTree(Prompt(token_ids=found)), []))[1].append(i)

    rewards: dict[int, np.ndarray] = {}
    batch: dict[int, Node] = {}
    done: list[SearchTree] = []
    size = 0

    def flush() -> None:
        nonlocal size
        pair.score_exact(list(batch.values()))
        rewards.update((i, node.rewards[pair.name]) for i, node in batch.items())
        batch.clear()
        for tree in done:
            pair.release(tree)
        done.clear()
        size = 0

    try:
        for prompt_ids, (tree, members) in trees.items():
            size += len(prompt_ids)
            for i in members:
                if batch and size + len(ids[i]) > batch_tokens:
                    flush()
                known = None if logprobs is None else _known(i, logprobs[i], len(ids[i]))
                batch[i] = tree.add(
                    tree.root, ids[i], logprobs=known, sampler=None if known is None else pair.reference_id
                )
                size += len(ids[i])
            done.append(tree)
        flush()
    finally:
        for tree, _ in trees.values():
            pair.release(tree)
    piece = pair.token_text.piece
    return [
        Scores(tuple(ids[i]), rewards[i], np.asarray(ends[i]), text_pieces(ids[i], piece)) for i in range(len(given))
    ]


def _listed(name: str, given: Iterable[Any]) -> list[Any]:
    if isinstance(given, str | bytes | Prompt) or not isinstance(given, Iterable):
        raise TypeError(f"{name} must be a list, one entry a response, got {type(given).__name__}: wrap it in a list")
    return list(given)


def _plain_ids(name: str, given: Any) -> list[int]:
    """Token ids out of a list, an array or a tensor."""
    items = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(items, Iterable) or isinstance(items, dict):
        raise TypeError(f"{name} must be a text or token ids, got {type(given).__name__}")
    items = list(items)
    if not all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in items):
        raise TypeError(f"{name} must be a text or a flat list of token ids, got {given!r:.80}")
    return [int(i) for i in items]


def _response_ids(pair: ImplicitPRM, place: int, given: Any, close: bool) -> list[int]:
    name = f"responses[{place}]"
    if isinstance(given, str):
        ids = encode_text(pair.need_tokenizer(), given, pair.token_text)
        eos = pair.eos_token_id
        if close and eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
    else:
        ids = _plain_ids(name, given)
    if not ids:
        raise ValueError(f"{name} is empty: at least one token is needed")
    return ids


def _prompt_ids(pair: ImplicitPRM, place: int, given: Any) -> tuple[int, ...]:
    try:
        prompt = Prompt.of(given.tolist() if hasattr(given, "tolist") else given)
        return encode_prompt(None if prompt.token_ids is not None else pair.need_tokenizer(), prompt)
    except (ValueError, TypeError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"prompts[{place}]: {error}") from error


def _fits(pair: ImplicitPRM, place: int, tokens: int) -> None:
    limit = pair.context
    if limit is not None and tokens > limit:
        raise ValueError(
            f"responses[{place}]: {tokens} tokens with its prompt exceed the pair's context of {limit} tokens"
        )


def _known_ids(pair: ImplicitPRM, name: str, ids: Sequence[int]) -> None:
    if not 0 <= min(ids) <= max(ids) < pair.vocab:
        raise ValueError(f"{name}: token ids {min(ids)}..{max(ids)} lie outside the vocabulary of {pair.vocab}")


def _step_ends(
    pair: ImplicitPRM, ids: Sequence[Sequence[int]], steps: StepRule | Sequence[Sequence[int]] | None
) -> list[Sequence[int]]:
    if steps is None or isinstance(steps, StepRule):
        rule = steps or StepRule()
        return [rule.ends(response, pair.token_text.piece) for response in ids]
    if isinstance(steps, str) or not isinstance(steps, Sequence):
        raise TypeError(f"steps must be a StepRule or one list of step ends a response, got {type(steps).__name__}")
    if len(steps) != len(ids):
        raise ValueError(f"steps has {len(steps)} lists of step ends for {len(ids)} responses")
    for place, (ends, response) in enumerate(zip(steps, ids, strict=True)):
        rising = all(a < b for a, b in zip([0, *ends], ends, strict=False))
        if not rising or not len(ends) or ends[-1] != len(response):
            raise ValueError(
                f"steps[{place}]={list(ends)}: token counts that rise from above 0 to the response's "
                f"{len(response)} tokens are needed"
            )
    return list(steps)


def _known(place: int, given: Any, tokens: int) -> np.ndarray:
    known = np.asarray(given, np.float32)
    if np.isnan(known).any():
        raise ValueError(f"logprobs[{place}] holds NaN")
    if known.shape != (tokens,):
        raise ValueError(f"logprobs[{place}] has shape {known.shape} for a response of {tokens} tokens")
    return known
