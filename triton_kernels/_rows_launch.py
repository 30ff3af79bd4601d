"""Launches of the row-wise kernels, arguments unchecked. Imports Triton only to launch."""

from __future__ import annotations

import torch
from torch import Tensor

from prm_search.triton_kernels import launch, tiles
from prm_search.triton_kernels.reference import COLDEST

_GUIDE_BLOCK = 2048
_PART_BLOCK = 1024
PICK_WARPS = 8  # four spill on sm_90


def guide_logits(policy: Tensor, prm: Tensor, ref: Tensor, alpha: Tensor, out: Tensor | None = None) -> Tensor:
    """The Triton launches of `guide_logits`, arguments unchecked."""
    alpha = alpha.contiguous()
    if out is None:
        out = torch.empty_like(policy, memory_format=torch.contiguous_format)
    rows, vocabulary = policy.shape
    if out.numel() == 0:
        return out
    from prm_search.triton_kernels import _jit_rows as jit

    widest = max(prm.shape[1], ref.shape[1], 1)
    splits, share = tiles.row_splits(rows * 2, widest, launch.processors(policy.device), _PART_BLOCK)
    parts = policy.new_empty((rows, 2, splits, 2), dtype=torch.float32)
    launch.launch(
        jit.logsumexp_parts_kernel, (splits, rows, 2), policy.device, prm, ref, alpha, parts, prm.shape[1],
        ref.shape[1], prm.stride(0), ref.stride(0), splits, share, BLOCK=_PART_BLOCK, num_warps=4,
    )  # fmt: skip
    launch.launch(
        jit.guide_kernel, (-(-vocabulary // _GUIDE_BLOCK), rows), policy.device, policy, prm, ref, alpha, parts, out,
        vocabulary, min(vocabulary, prm.shape[1], ref.shape[1]), policy.stride(0), prm.stride(0), ref.stride(0),
        out.stride(0), splits, SPLITS=tiles.power_of_two(splits), BLOCK=_GUIDE_BLOCK, num_warps=4,
    )  # fmt: skip
    return out


def sample_rows(logits: Tensor, draws: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The Triton launches of `sample_rows`, arguments unchecked."""
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    out = torch.empty((2, rows), dtype=torch.float32, device=logits.device)
    if rows:
        from prm_search.triton_kernels import _jit_sample as jit

        temperature, draws = temperature.contiguous(), draws.contiguous()
        splits, share = tiles.row_splits(rows, vocabulary, launch.processors(logits.device), _PART_BLOCK)
        parts = torch.empty((rows, splits, 3), dtype=torch.float32, device=logits.device)
        firsts = torch.empty((rows, splits), dtype=torch.int32, device=logits.device)
        launch.launch(
            jit.sample_parts_kernel, (splits, rows), logits.device, logits, temperature, parts, firsts, vocabulary,
            logits.stride(0), splits, share, COLDEST=COLDEST, BLOCK=_PART_BLOCK, num_warps=4,
        )  # fmt: skip
        launch.launch(
            jit.sample_pick_kernel, (rows,), logits.device, logits, temperature, draws, parts, firsts, tokens, out,
            vocabulary, logits.stride(0), splits, share, rows, COUNTERS=draws.dtype == torch.int64, COLDEST=COLDEST,
            SPLITS=tiles.power_of_two(splits), BLOCK=_PART_BLOCK, num_warps=PICK_WARPS,
        )  # fmt: skip
    return tokens, out[0], out[1]
