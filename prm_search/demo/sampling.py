"""Batched sampling for the recipe: a plain DynamicCache loop, independent of the library's engine.

It is deliberately the obvious implementation: what the recipe reports does not rest on the code that it showcases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from .tokenizer import EOS_ID, PAD_ID

_ROWS = 1024  # rows of one batch; bounds memory


@dataclass(frozen=True, slots=True)
class Sample:
    """Tokens drawn after a prefix, and their raw log-probs (nats) under each model: ``log_probs[model][token]``."""

    ids: list[int]
    log_probs: list[list[float]]


@torch.inference_mode()
def sample(
    models: Sequence[PreTrainedModel],
    prefixes: Sequence[Sequence[int]],
    *,
    copies: int = 1,
    stop: Sequence[int] = (EOS_ID,),
    max_new_tokens: int = 48,
    generator: torch.Generator | None = None,
) -> list[Sample]:
    """Continues every prefix at temperature 1 until it has drawn a stop token or `max_new_tokens`.

    Args:
        models: the first one draws; all of them score what it draws.
        prefixes: token ids, of any lengths.
        copies: continuations a prefix; those of one prefix come one after the other.
        stop: token ids that end a continuation and belong to it.
        max_new_tokens: at most this many tokens a continuation.
        generator: where draws come from; None takes the most likely token instead.

    Returns:
        ``len(prefixes) * copies`` samples.
    """
    samples: list[Sample] = []
    step = max(1, _ROWS // copies)
    for start in range(0, len(prefixes), step):
        samples += _sample_batch(models, prefixes[start : start + step], copies, stop, max_new_tokens, generator)
    return samples


def _sample_batch(
    models: Sequence[PreTrainedModel],
    prefixes: Sequence[Sequence[int]],
    copies: int,
    stop: Sequence[int],
    max_new_tokens: int,
    generator: torch.Generator | None,
) -> list[Sample]:
    longest = max(len(p) for p in prefixes)
    tokens = torch.tensor([[PAD_ID] * (longest - len(p)) + list(p) for p in prefixes])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prefixes])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    caches = [DynamicCache(config=model.config) for model in models]
    rows = [_next_token(model, tokens, mask, positions, cache) for model, cache in zip(models, caches, strict=True)]
    if copies > 1:  # the prefix is encoded once
        for cache in caches:
            cache.batch_repeat_interleave(copies)
        rows = [row.repeat_interleave(copies, 0) for row in rows]
        mask, positions = mask.repeat_interleave(copies, 0), positions.repeat_interleave(copies, 0)
    stops = torch.tensor(list(stop))
    going = torch.ones(len(mask), dtype=torch.bool)
    drawn: list[torch.Tensor] = []
    alive: list[torch.Tensor] = []
    scored: list[list[torch.Tensor]] = [[] for _ in models]
    while True:
        if generator is None:
            token = rows[0].argmax(-1, keepdim=True)
        else:
            token = torch.multinomial(rows[0].exp(), 1, generator=generator)
        drawn.append(token)
        alive.append(going)
        for values, row in zip(scored, rows, strict=True):
            values.append(row.gather(1, token))
        going = going & ~torch.isin(token.squeeze(1), stops)
        if len(drawn) == max_new_tokens or not going.any():
            break
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        positions = positions[:, -1:] + 1
        rows = [_next_token(model, token, mask, positions, cache) for model, cache in zip(models, caches, strict=True)]
    lengths = torch.stack(alive).sum(0).tolist()
    ids = torch.cat(drawn, 1).tolist()
    log_probs = [torch.cat(values, 1).tolist() for values in scored]
    return [Sample(ids[i][:n], [values[i][:n] for values in log_probs]) for i, n in enumerate(lengths)]


def _next_token(
    model: PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache
) -> torch.Tensor:
    """log p of the next token, [rows, vocabulary] float32; the cache grows by the tokens."""
    logits = model(
        input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
    ).logits
    return logits[:, -1].float().log_softmax(-1)


def response_log_probs(model: PreTrainedModel, prompts: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
    """log p of each response token, with gradients.

    Args:
        model: a causal LM.
        prompts: [rows, P] token ids, all of one length.
        responses: [rows, R] token ids, padded on the right (causal attention makes that harmless).

    Returns:
        [rows, R] float32, nats; meaningless where the response is padding.
    """
    width = responses.shape[1]
    logits = model(input_ids=torch.cat([prompts, responses], 1), use_cache=False, logits_to_keep=width + 1).logits
    return logits[:, :-1].float().log_softmax(-1).gather(2, responses[:, :, None]).squeeze(2)
