"""Confidence of the policy in each drawn token, where a row's request asks for it; nothing is computed else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .decoding_row import DecodingRow
from .to_device import to_device


def confidence_columns(logprobs: torch.Tensor, rows: Sequence[DecodingRow]) -> list[torch.Tensor]:
    """The log-probability of the most probable token, and the confidence that Node.confidences defines.

    Args:
        logprobs: [R, V] nats: the policy's own distribution for each row.
        rows: what is decoded.

    Returns:
        Two columns [R] fp64, nats; none where no row asks. Rows that do not ask have some number.
    """
    counts = [row.request.sampling.confidence_tokens for row in rows]
    wants_top = any(row.request.sampling.steps.confidence is not None for row in rows)
    most = min(max(*counts, int(wants_top)), logprobs.shape[1])
    if not most:
        return []
    best = logprobs.topk(most, dim=-1).values.double()
    (last,) = to_device([np.clip(np.array(counts), 1, most) - 1], logprobs.device)
    means = best.cumsum(-1).gather(1, last.long()[:, None]).squeeze(1) / (last + 1)
    return [best[:, 0], -means]


def ranked_tokens(tokens: torch.Tensor, logprobs: torch.Tensor, rows: Sequence[DecodingRow]) -> torch.Tensor:
    """Drawn tokens, with those of ranked rows (see Draw.rank) replaced by the most probable ones that they stand for.

    Args:
        tokens: [R] int64, as drawn.
        logprobs: [R, V] nats: the policy's own distribution for each row.
        rows: what is decoded.

    Returns:
        [R] int64.
    """
    places = [(place, row.rank) for place, row in enumerate(rows) if row.rank is not None]
    if not places:
        return tokens
    at, ranks = to_device([np.array(column) for column in zip(*places, strict=True)], logprobs.device)
    best = logprobs.index_select(0, at).topk(max(rank for _, rank in places) + 1, dim=-1).indices
    chosen = best.gather(1, ranks.long()[:, None]).squeeze(1)
    return tokens.scatter(0, at.long().to(tokens.device), chosen.to(tokens.device))
