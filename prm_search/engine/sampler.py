"""Log-probabilities -> tokens: temperature and filters, then the inverse CDF of counter-based uniforms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ..rng import uniforms
from ..sampling import Sampling
from .decoding_row import DecodingRow
from .to_device import number_to_device

BLOCK = 256  # tokens of the vocabulary that are summed first when one is drawn
COLDEST = 1e-30  # temperatures below are this one: the smallest floats are 0 where tensors are divided by them


def filtered(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Temperature, top-k, top-p and min-p, in transformers' order and with its conventions.

    Args:
        logits: [R, V] logits or log-probabilities, nats.
        sampling: temperature > 0.

    Returns:
        [R, V] with -inf for the tokens filtered out.
    """
    # The most probable token is at 0, so that a temperature next to 0 leaves it finite.
    scores = (logits - logits.max(dim=-1, keepdim=True).values) / max(sampling.temperature, COLDEST)
    if sampling.top_k and sampling.top_k < scores.shape[-1]:
        kth = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = scores.sort(dim=-1, descending=True)
        weights = ordered.softmax(-1)
        before = weights.cumsum(-1) - weights  # mass of the more probable tokens: the first is always kept
        ordered = ordered.masked_fill(before >= sampling.top_p, -torch.inf)
        scores = torch.full_like(scores, -torch.inf).scatter(1, order, ordered)
    if sampling.min_p > 0.0:
        top = scores.max(dim=-1, keepdim=True).values
        floor = top + torch.log(torch.tensor(sampling.min_p, dtype=scores.dtype, device=scores.device))
        scores = scores.masked_fill(scores < floor, -torch.inf)
    return scores


def inverse_cdf(scores: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token at which the cumulative probability, in vocabulary order, first exceeds the uniform number.

    Args:
        scores: [R, V] unnormalised log-probabilities, -inf where forbidden.
        uniform: [R] float64 in [0, 1).

    Returns:
        [R] int64, never a token of probability zero.
    """
    weights = F.pad(scores.softmax(-1), (0, -scores.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    # Two levels: one running sum over a whole vocabulary in fp64 would be most of a token step.
    sums = weights.sum(-1, dtype=torch.float64).cumsum(-1)  # [R, blocks]
    goal = _below(uniform.to(sums.device)[:, None] * sums[:, -1:], sums)
    block = torch.searchsorted(sums, goal, right=True)
    before = F.pad(sums, (1, 0)).gather(1, block)
    inside = weights.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1).cumsum(-1, dtype=torch.float64)
    place = torch.searchsorted(inside, _below(goal - before, inside), right=True)
    return (block * BLOCK + place).squeeze(1)


def _below(goal: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """`goal` [R, 1], kept below the last of its row's running sums, which rounding may have it reach."""
    last = sums[:, -1:]
    return torch.minimum(goal, torch.nextafter(last, torch.zeros_like(last)))


class Sampler:
    """Draws one token a row. Subclass and override `scores` to put other logits processors in."""

    def scores(self, logprobs: torch.Tensor, rows: Sequence[DecodingRow]) -> torch.Tensor:
        """[R, V] log-probabilities -> [R, V] scores to draw from, after temperature and filters."""
        out = logprobs
        for sampling, members in _by_sampling(rows).items():
            if sampling.temperature == 0 or _is_plain(sampling):
                continue
            if len(members) == len(rows):
                return filtered(logprobs, sampling)
            out = out.clone() if out is logprobs else out
            out[members] = filtered(logprobs[members], sampling)
        return out

    def draw(self, logprobs: torch.Tensor, rows: Sequence[DecodingRow]) -> torch.Tensor:
        """One token for each row, [R] int64 on the device of `logprobs`; the host does not wait for it.

        Args:
            logprobs: [R, V] nats; row i is the next-token distribution of rows[i].
            rows: what is decoded.
        """
        scores = self.scores(logprobs, rows)
        greedy = [row.request.sampling.temperature == 0 for row in rows]
        if all(greedy):
            return scores.argmax(-1)
        uniform = uniforms(
            [row.request.sampling.seed for row in rows],
            [row.request.node.tree.stream for row in rows],
            [row.lineage for row in rows],
            [row.position for row in rows],
        )
        tokens = inverse_cdf(scores, number_to_device(uniform, scores.device))
        if any(greedy):
            tokens = torch.where(number_to_device(np.array(greedy), scores.device), scores.argmax(-1), tokens)
        return tokens


def _is_plain(s: Sampling) -> bool:
    return s.temperature == 1.0 and s.top_p == 1.0 and not s.top_k and s.min_p == 0.0


def _by_sampling(rows: Sequence[DecodingRow]) -> dict[Sampling, list[int]]:
    groups: dict[Sampling, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.request.sampling, []).append(i)
    return groups
