"""Inverse CDF over a vocabulary in blocks: the token that one running sum gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prm_search.engine.sampler import BLOCK, inverse_cdf


def one_running_sum(scores: torch.Tensor, uniform: torch.Tensor) -> list[int]:
    cdf = scores.softmax(-1).double().cumsum(-1).numpy()
    return [int(np.searchsorted(row, u * row[-1], side="right")) for row, u in zip(cdf, uniform.tolist(), strict=True)]


@pytest.mark.parametrize("vocabulary", [1, 7, BLOCK, BLOCK + 1, 5 * BLOCK - 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_draw_what_one_running_sum_draws(vocabulary: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(vocabulary)
    scores = 3 * torch.randn(300, vocabulary, generator=draw, dtype=dtype)
    scores[:, 1::3] = -torch.inf
    uniform = torch.rand(300, generator=draw, dtype=torch.float64)
    assert inverse_cdf(scores, uniform).tolist() == one_running_sum(scores, uniform)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_no_token_of_probability_zero_is_drawn(uniform: float) -> None:
    """At both ends of the unit interval, with ruled out tokens in front, behind, and in whole blocks."""
    draw = torch.Generator().manual_seed(0)
    for possible in ([3 * BLOCK - 1], [0], [BLOCK - 1, BLOCK], [5, 2 * BLOCK + 7], list(range(BLOCK, 2 * BLOCK))):
        for _ in range(20):
            scores = torch.full((1, 3 * BLOCK), -torch.inf)
            scores[0, possible] = 5 * torch.randn(len(possible), generator=draw)
            token = inverse_cdf(scores, torch.tensor([uniform], dtype=torch.float64)).item()
            assert token in possible
            if uniform == 0.0:
                assert token == possible[0]


def test_frequencies_are_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.25, 0.125, 0.125])
    uniform = (torch.arange(1024, dtype=torch.float64) + 0.5) / 1024
    tokens = inverse_cdf(probabilities.log().expand(1024, -1), uniform)
    assert torch.bincount(tokens, minlength=5).tolist() == [512, 0, 256, 128, 128]
