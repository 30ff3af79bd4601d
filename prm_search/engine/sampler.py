"""Log-probabilities -> tokens: temperature and filters, then a counter-based draw; see `sample_rows`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..rng import counters_of, uniforms_at
from ..sampling import Sampling
from ..triton_kernels import sample_rows
from ..triton_kernels.reference import COLDEST
from .decoding_row import DecodingRow
from .to_device import number_to_device


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
        samplings = [row.request.sampling for row in rows]
        heat = np.array([sampling.temperature for sampling in samplings])
        scores = logprobs
        if type(self).scores is not Sampler.scores or any(_filters(sampling) for sampling in samplings):
            scores, heat = self.scores(logprobs, rows), (heat > 0).astype(float)
        counters = counters_of(
            [sampling.seed for sampling in samplings],
            [row.request.node.tree.stream for row in rows],
            [row.lineage for row in rows],
            [row.position for row in rows],
        )
        draws = counters if scores.is_cuda else uniforms_at(counters)
        temperature = number_to_device(heat, scores.device) if (heat != heat[0]).any() else float(heat[0])
        return sample_rows(scores, number_to_device(draws, scores.device), temperature).tokens


def _filters(sampling: Sampling) -> bool:
    return sampling.top_p < 1.0 or bool(sampling.top_k) or sampling.min_p > 0.0


def _is_plain(sampling: Sampling) -> bool:
    return sampling.temperature == 1.0 and not _filters(sampling)


def _by_sampling(rows: Sequence[DecodingRow]) -> dict[Sampling, list[int]]:
    groups: dict[Sampling, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.request.sampling, []).append(i)
    return groups
