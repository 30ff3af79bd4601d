"""Triton kernels of `linear_logprob`. Import only where a launch is certain.

    z = cap(scale * (x @ w.T + bias));   logsumexp = log sum_v exp(z_v);   logprob = z_target - logsumexp

Forward: program (row tile, split) walks its share of the vocabulary tiles, keeps each row's running (maximum, sum of
exp, target logit) in registers and writes them, fp32, to partials [3, splits, N]; a merge kernel combines the splits
in a fixed order. No lock, no atomic, no host sync: the same call gives the same bits. Sizes that change from call to
call are not specialised: each variant would be a compilation in the middle of a search.
Backward: one tile kernel writes the gradient of a vocabulary chunk's logits; the two matrix products that follow are
plain GEMMs (_linear_autograd.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

# Powers of two throughout: exp would handle denormals, which no sum here can tell from 0, at three instructions each.
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _products(
    x_ptr, w_ptr, x_desc, w_desc, N, V, D, stride_x, stride_w, row0, col0,
    TMA: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x @ w.T for rows from row0 and vocabulary entries from col0: fp32 [BM, BV], nothing masked."""
    acc = tl.zeros([BM, BV], dtype=tl.float32)
    if TMA:
        for k in range(0, D, BK):  # descriptors read 0 past the edges, in every direction
            acc = tl.dot(x_desc.load([row0, k]), w_desc.load([col0, k]).T, acc)
    else:
        # Rows past the end are clamped instead of masked: their results are dropped by the caller.
        rows = tl.minimum(row0 + tl.arange(0, BM), N - 1).to(tl.int64)
        cols = tl.minimum(col0 + tl.arange(0, BV), V - 1).to(tl.int64)
        depth = tl.arange(0, BK)
        x_ptrs = x_ptr + rows[:, None] * stride_x + depth[None, :]
        w_ptrs = w_ptr + cols[None, :] * stride_w + depth[:, None]
        for k in range(0, D, BK):
            if EVEN_D:
                x = tl.load(x_ptrs)
                w = tl.load(w_ptrs)
            else:
                x = tl.load(x_ptrs, mask=depth[None, :] < D - k, other=0.0)
                w = tl.load(w_ptrs, mask=depth[:, None] < D - k, other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
            x_ptrs += BK
            w_ptrs += BK
    return acc


@triton.jit
def _logits(acc, bias_ptr, cols, V, scale, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """Bias, scale and cap on products [BM, BC] of the vocabulary entries `cols` [BC]."""
    if HAS_BIAS:
        acc += tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    acc = acc * scale
    if HAS_CAP:
        # tanh(y) = sign(y) * (1 - e) / (1 + e) with e = exp(-2|y|): neither overflows nor needs libdevice.
        y = acc / softcap
        e = tl.exp2(tl.abs(y) * (-2.0 * LOG2E))
        t = (1.0 - e) / (1.0 + e)
        acc = softcap * tl.where(y < 0, -t, t)
    return acc


@triton.jit
def _fold(top, total, z, factor):
    """Fold columns into each row's running maximum and sum; `factor` turns differences of z into powers of two."""
    new_top = tl.maximum(top, tl.max(z, 1))
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    total = total * tl.exp2((top - shift) * factor) + tl.sum(tl.exp2((z - shift[:, None]) * factor), 1)
    return new_top, total


@triton.jit(do_not_specialize=["N", "splits"], do_not_specialize_on_alignment=["target_ptr"])
def split_kernel(
    x_ptr, w_ptr, bias_ptr, target_ptr, part_ptr, N, V, D, stride_x, stride_w, scale, softcap, splits,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, RAW: tl.constexpr, TMA: tl.constexpr, EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles * splits,): partials [3, splits, N].

    RAW: no bias, no cap and a scale above 0. Then maxima and target logits stay in the products' unit to the end.
    """
    pid = tl.program_id(0)
    # Row tiles are the fast axis: programs that run together read the same weight tiles, so L2 serves all but one.
    row_tiles = tl.cdiv(N, BM)
    row0 = (pid % row_tiles) * BM
    split = pid // row_tiles
    tiles = tl.cdiv(V, BV)
    rows = row0 + tl.arange(0, BM)
    target = tl.load(target_ptr + rows, mask=rows < N, other=-1).to(tl.int32)
    if TMA:
        x_desc = tl.make_tensor_descriptor(x_ptr, shape=[N, D], strides=[stride_x, 1], block_shape=[BM, BK])
        w_desc = tl.make_tensor_descriptor(w_ptr, shape=[V, D], strides=[stride_w, 1], block_shape=[BV, BK])
    else:
        x_desc = x_ptr
        w_desc = w_ptr

    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    hit = tl.zeros([BM], tl.float32)
    factor = LOG2E * (scale if RAW else 1.0)
    for tile in range(split * tiles // splits, (split + 1) * tiles // splits):
        col0 = tile * BV
        acc = _products(
            x_ptr, w_ptr, x_desc, w_desc, N, V, D, stride_x, stride_w, row0, col0,
            TMA, EVEN_D, PRECISION, BM, BV, BK,
        )  # fmt: skip
        cols = col0 + tl.arange(0, BV)
        z = acc if RAW else _logits(acc, bias_ptr, cols, V, scale, softcap, HAS_BIAS, HAS_CAP)
        if col0 + BV > V:  # -inf before the maximum and the sum: a padded column counted as a logit of 0 is wrong
            z = tl.where(cols[None, :] < V, z, -float("inf"))
        if tl.max(((target >= col0) & (target < col0 + BV)).to(tl.int32), 0) > 0:  # rare, too
            hit += tl.sum(tl.where(cols[None, :] == target[:, None], z, 0.0), 1)
        if BV > 128:  # in halves: the temporaries of 256 columns at once would spill
            left, right = tl.reshape(z, [BM, 2, BV // 2]).permute(0, 2, 1).split()
            top, total = _fold(top, total, left, factor)
            top, total = _fold(top, total, right, factor)
        else:
            top, total = _fold(top, total, z, factor)
    if RAW:
        top *= scale
        hit *= scale
    plane = splits * N
    out = part_ptr + split * N + rows
    tl.store(out, top, mask=rows < N)
    tl.store(out + plane, total, mask=rows < N)
    tl.store(out + 2 * plane, hit, mask=rows < N)


@triton.jit
def _merged(part_ptr, rows, target, N, V, splits, BN: tl.constexpr):
    """(logprob, logsumexp) of `rows`; a target outside the vocabulary has logprob nan."""
    top = tl.full([BN], -float("inf"), tl.float32)
    total = tl.zeros([BN], tl.float32)
    hit = tl.zeros([BN], tl.float32)
    plane = splits * N
    for split in range(splits):
        part = part_ptr + split * N + rows
        other_top = tl.load(part, mask=rows < N, other=0.0)
        other = tl.load(part + plane, mask=rows < N, other=1.0)
        hit += tl.load(part + 2 * plane, mask=rows < N, other=0.0)
        new_top = tl.maximum(top, other_top)
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp(top - shift) + other * tl.exp(other_top - shift)
        top = new_top
    log_total = tl.log(total)
    known = (target >= 0) & (target < V)
    # The maximum is taken off before the logarithm is: far from 0, logsumexp itself is rounded to the logits' ulp.
    return tl.where(known, (hit - top) - log_total, float("nan")), top + log_total


@triton.jit(do_not_specialize=["N", "splits"], do_not_specialize_on_alignment=["target_ptr"])
def merge_kernel(part_ptr, target_ptr, logprob_ptr, lse_ptr, N, V, splits, BN: tl.constexpr):
    """Grid (cdiv(N, BN),): partials of one model to logprob [N] and logsumexp [N]."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    target = tl.load(target_ptr + rows, mask=rows < N, other=0).to(tl.int32)
    logprob, lse = _merged(part_ptr, rows, target, N, V, splits, BN)
    tl.store(logprob_ptr + rows, logprob, mask=rows < N)
    tl.store(lse_ptr + rows, lse, mask=rows < N)


@triton.jit(do_not_specialize=["N", "first"], do_not_specialize_on_alignment=["target_ptr"])
def logit_gradient_kernel(
    x_ptr, w_ptr, bias_ptr, target_ptr, lse_ptr, grad_logprob_ptr, grad_lse_ptr, out_ptr,
    N, V, D, stride_x, stride_w, stride_out, first, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, TMA: tl.constexpr, EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles * column tiles,): gradient of x @ w.T + bias for the V columns of a chunk that starts at `first`.

    w, bias and V are the chunk's. With p = exp(z - lse): g_logprob * (onehot - p) + g_lse * p, times the derivatives
    of cap and scale, rounded to the operands' dtype for the matrix products that follow.
    """
    row_tiles = tl.cdiv(N, BM)
    row0 = (tl.program_id(0) % row_tiles) * BM
    col0 = (tl.program_id(0) // row_tiles) * BV
    if TMA:
        x_desc = tl.make_tensor_descriptor(x_ptr, shape=[N, D], strides=[stride_x, 1], block_shape=[BM, BK])
        w_desc = tl.make_tensor_descriptor(w_ptr, shape=[V, D], strides=[stride_w, 1], block_shape=[BV, BK])
    else:
        x_desc = x_ptr
        w_desc = w_ptr
    acc = _products(
        x_ptr, w_ptr, x_desc, w_desc, N, V, D, stride_x, stride_w, row0, col0, TMA, EVEN_D, PRECISION, BM, BV, BK
    )
    rows = row0 + tl.arange(0, BM)
    cols = col0 + tl.arange(0, BV)
    z = _logits(acc, bias_ptr, cols, V, scale, softcap, HAS_BIAS, HAS_CAP)
    lse = tl.load(lse_ptr + rows, mask=rows < N, other=0.0)
    target = tl.load(target_ptr + rows, mask=rows < N, other=-1).to(tl.int32) - first
    g_logprob = tl.load(grad_logprob_ptr + rows, mask=rows < N, other=0.0)
    g_lse = tl.load(grad_lse_ptr + rows, mask=rows < N, other=0.0)
    grad = tl.exp2((z - lse[:, None]) * LOG2E) * (g_lse - g_logprob)[:, None]
    grad += tl.where(cols[None, :] == target[:, None], g_logprob[:, None], 0.0)
    if HAS_CAP:
        grad *= 1.0 - (z / softcap) * (z / softcap)
    grad *= scale
    out = out_ptr + rows[:, None].to(tl.int64) * stride_out + cols[None, :]
    keep = (rows[:, None] < N) & (cols[None, :] < V)
    tl.store(out, grad.to(out_ptr.dtype.element_ty), mask=keep)
