"""The second kernel of the two-kernel path that serving engines take: logits in memory -> log p of one target a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _gather_kernel(logits_ptr, target_ptr, out_ptr, V, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):  # a running maximum and sum a lane
        x = tl.load(logits_ptr + row * stride + start + column, mask=start + column < V, other=-float("inf"))
        x = x.to(tl.float32)
        higher = tl.maximum(top, x)
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(top - shift) + tl.exp(x - shift)
        top = higher
    most = tl.max(top, 0)
    total = tl.sum(total * tl.exp(top - most), 0)
    target = tl.load(logits_ptr + row * stride + tl.load(target_ptr + row)).to(tl.float32)
    tl.store(out_ptr + row, target - most - tl.log(total))


def gather_logprob(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p of targets `[N]` under logits `[N, V]`, fp32 inside: one pass over the logits."""
    out = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    _gather_kernel[(logits.shape[0],)](logits, targets, out, logits.shape[1], logits.stride(0), BLOCK=4096, num_warps=8)
    return out
