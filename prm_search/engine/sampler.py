"""Log-probabilities -> tokens: temperature and filters, then a counter-based draw; see `sample_rows`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..rng import counters_of, uniforms_at
from ..sampling import Sampling
from ..triton_kernels import Drawn, sample_rows
from ..triton_kernels.launch import Backend
from ..triton_kernels.reference import COLDEST
from .decoding_row import DecodingRow
from .to_device import number_to_device

if TYPE_CHECKING:
    from .row_table import RowTable


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
        floor = top + math.log(sampling.min_p)
        scores = scores.masked_fill(scores < floor, -torch.inf)
    return scores


class Sampler:
    """Draws one token a row. Subclass and override `scores` to put other logits processors in.

    Attributes:
        takes_logits: `scores` takes logits as they are, not log-probabilities. For a class that overrides it.
        reads_rows: `scores` or `draw` reads what rows have drawn, so that must be up to date at every token. For an
            object whose class overrides one of them.
    """

    takes_logits = False
    reads_rows = True

    def scores(self, logprobs: torch.Tensor, rows: Sequence[DecodingRow]) -> torch.Tensor:
        """[R, V] log-probabilities -> [R, V] scores to draw from, after temperature and filters."""
        out = logprobs
        for sampling, members in _by_sampling(rows).items():
            if sampling.temperature == 0 or _is_plain(sampling):
                continue
            if len(members) == len(rows):
                return filtered(logprobs, sampling)
            out = out.clone() if out is logprobs else out
            at = number_to_device(np.array(members), logprobs.device)  # a list would be waited for
            out[at] = filtered(logprobs[at], sampling)
        return out

    def draw(self, logprobs: torch.Tensor, rows: Sequence[DecodingRow]) -> torch.Tensor:
        """One token for each row, [R] int64 on the device of `logprobs`; the host does not wait for it.

        The decoder calls it where it is overridden. Otherwise it calls `sample`, which draws the same.

        Args:
            logprobs: [R, V] nats; row i is the next-token distribution of rows[i].
            rows: what is decoded.
        """
        counters = counters_of(
            [row.request.sampling.seed for row in rows],
            [row.request.node.tree.stream for row in rows],
            [row.lineage for row in rows],
            [row.position for row in rows],
        )
        heat = np.array([row.request.sampling.temperature for row in rows])
        draws = counters if logprobs.is_cuda else uniforms_at(counters)
        return self._drawn(logprobs, rows, heat, draws, any(_filters(row.request.sampling) for row in rows))[0].tokens

    def sample(self, logits: torch.Tensor, table: RowTable) -> tuple[Drawn, bool]:
        """One token for each row of a table, and what is known of its log-probability.

        Args:
            logits: [R, V]; log-probabilities where the class overrides `scores` and does not take logits.
            table: what is decoded.

        Returns:
            the tokens, and whether the log-probabilities with them are those of `logits`: no filter, no processor.
        """
        draws = table.counters() if logits.is_cuda else table.uniforms()
        return self._drawn(logits, table.rows, table.heat, draws, any(map(_filters, table.samplings)))

    def _drawn(
        self, logits: torch.Tensor, rows: Sequence[DecodingRow], heat: np.ndarray, draws: np.ndarray, filters: bool
    ) -> tuple[Drawn, bool]:
        own = filters or type(self).scores is not Sampler.scores
        if own:
            logits, heat = self.scores(logits, rows), (heat > 0).astype(float)
        temperature = number_to_device(heat, logits.device) if (heat != heat[0]).any() else float(heat[0])
        backend: Backend = "auto" if logits.is_cuda else "torch"
        return sample_rows(logits, number_to_device(draws, logits.device), temperature, backend=backend), not own


def _filters(sampling: Sampling) -> bool:
    return sampling.top_p < 1.0 or bool(sampling.top_k) or sampling.min_p > 0.0


def _is_plain(sampling: Sampling) -> bool:
    return sampling.temperature == 1.0 and not _filters(sampling)


def _by_sampling(rows: Sequence[DecodingRow]) -> dict[Sampling, list[int]]:
    groups: dict[Sampling, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.request.sampling, []).append(i)
    return groups
