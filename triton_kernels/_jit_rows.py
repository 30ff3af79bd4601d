"""Triton kernels of `guide_logits`. Import only where a launch is certain."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _row_part(x_ptr, V, split, share, BLOCK: tl.constexpr):
    """(maximum, sum of exp) of x_ptr[split * share : (split + 1) * share], cut at V."""
    top = -float("inf")
    total = 0.0
    for first in range(split * share, tl.minimum((split + 1) * share, V), BLOCK):
        cols = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, 0))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift), 0)
        top = new_top
    return top, total


@triton.jit(do_not_specialize=["splits"])
def logsumexp_parts_kernel(
    prm_ptr, ref_ptr, alpha_ptr, part_ptr, prm_V, ref_V, stride_prm, stride_ref, splits, share, BLOCK: tl.constexpr
):
    """Grid (splits, B, 2): part [B, 2, splits, 2] = (maximum, sum of exp) of PRM and reference rows that are used."""
    row = tl.program_id(1).to(tl.int64)
    if tl.load(alpha_ptr + row).to(tl.float32) == 0.0:
        return
    split = tl.program_id(0)
    if tl.program_id(2) == 0:
        top, total = _row_part(prm_ptr + row * stride_prm, prm_V, split, share, BLOCK)
    else:
        top, total = _row_part(ref_ptr + row * stride_ref, ref_V, split, share, BLOCK)
    out = part_ptr + ((row * 2 + tl.program_id(2)) * splits + split) * 2
    tl.store(out, top)
    tl.store(out + 1, total)


@triton.jit
def _logsumexp(part_ptr, splits, SPLITS: tl.constexpr):
    at = tl.arange(0, SPLITS)
    top = tl.load(part_ptr + at * 2, mask=at < splits, other=-float("inf"))
    total = tl.load(part_ptr + at * 2 + 1, mask=at < splits, other=0.0)
    best = tl.max(top, 0)
    shift = tl.where(best == -float("inf"), 0.0, best)
    return best + tl.log(tl.sum(total * tl.exp(top - shift), 0))


@triton.jit(do_not_specialize=["splits"])
def guide_kernel(
    policy_ptr, prm_ptr, ref_ptr, alpha_ptr, part_ptr, out_ptr, V, WIDTH, stride_policy, stride_prm, stride_ref,
    stride_out, splits, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(V, BLOCK), B): policy + alpha * (log_softmax(prm) - log_softmax(ref)) on the first WIDTH columns."""
    row = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    raw = tl.load(policy_ptr + row * stride_policy + cols, mask=cols < V, other=0.0)
    out = out_ptr + row * stride_out + cols
    alpha = tl.load(alpha_ptr + row).to(tl.float32)
    if alpha == 0.0:
        tl.store(out, raw, mask=cols < V)
    else:
        prm_lse = _logsumexp(part_ptr + row * 4 * splits, splits, SPLITS)
        ref_lse = _logsumexp(part_ptr + (row * 4 + 2) * splits, splits, SPLITS)
        known = cols < WIDTH
        prm = tl.load(prm_ptr + row * stride_prm + cols, mask=known, other=0.0).to(tl.float32)
        ref = tl.load(ref_ptr + row * stride_ref + cols, mask=known, other=0.0).to(tl.float32)
        policy = raw.to(tl.float32)
        steered = policy + alpha * ((prm - prm_lse) - (ref - ref_lse))
        masked = (prm == -float("inf")) | (ref == -float("inf")) | (policy == -float("inf"))
        value = tl.where(known & (masked == 0), steered, policy)
        tl.store(out, value.to(out_ptr.dtype.element_ty), mask=cols < V)
