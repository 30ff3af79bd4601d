"""Triton kernels of `sample_rows`. Import only where a launch is certain."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _uniform(key, lineage, position):
    """Philox 4x32-10 of (lineage, position, 0) under the key: a multiple of 2^-53 in [0, 1), fp64. All int64."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = lineage & low, (lineage >> 32) & low, position & low, position & 0
    k0, k1 = key & low, (key >> 32) & low
    for _ in tl.static_range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # the low 64 bits of the product are all of it
        c0, c1, c2, c3 = ((p1 >> 32) & low) ^ c1 ^ k0, p1 & low, ((p0 >> 32) & low) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return ((c0 << 21) | (c1 >> 11)).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _rate(temperature, COLDEST: tl.constexpr):
    """1 / temperature, finite."""
    return 1.0 / tl.maximum(temperature, COLDEST)


@triton.jit(do_not_specialize=["splits"])
def sample_parts_kernel(
    logit_ptr, temperature_ptr, part_ptr, first_ptr, V, stride, splits, share, COLDEST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (splits, R): part [R, splits, 3] = (maximum, sum of exp, the same at the row's temperature) of a share of
    the row's logits; first [R, splits] the first column that holds the maximum."""
    row, split = tl.program_id(1).to(tl.int64), tl.program_id(0)
    rate = _rate(tl.load(temperature_ptr + row).to(tl.float32), COLDEST)
    top, total, warm = -float("inf"), 0.0, 0.0
    column = split * share
    for first in range(split * share, tl.minimum((split + 1) * share, V), BLOCK):
        cols = first + tl.arange(0, BLOCK)
        x = tl.load(logit_ptr + row * stride + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
        highest = tl.max(x, 0)
        if highest > top:
            column = tl.min(tl.where(x == highest, cols, V), 0)
        new_top = tl.maximum(top, highest)
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift), 0)
        warm = warm * tl.exp((top - shift) * rate) + tl.sum(tl.exp((x - shift) * rate), 0)
        top = new_top
    at = row * splits + split
    tl.store(part_ptr + at * 3, top)
    tl.store(part_ptr + at * 3 + 1, total)
    tl.store(part_ptr + at * 3 + 2, warm)
    tl.store(first_ptr + at, column)


@triton.jit(do_not_specialize=["splits"])
def sample_pick_kernel(
    logit_ptr, temperature_ptr, draw_ptr, part_ptr, first_ptr, token_ptr, out_ptr, V, stride, splits, share, rows,
    COUNTERS: tl.constexpr, COLDEST: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (R,): token [R], and out [2, R] its log-probability and that of the most probable token."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    rate = _rate(temperature, COLDEST)
    at = tl.arange(0, SPLITS)
    part = part_ptr + (row * splits + at) * 3
    tops = tl.load(part, mask=at < splits, other=-float("inf"))
    best = tl.max(tops, 0)
    shift = tl.where(best == -float("inf"), 0.0, best)
    total = tl.sum(tl.load(part + 1, mask=at < splits, other=0.0) * tl.exp(tops - shift), 0)
    if temperature == 0.0:
        firsts = tl.load(first_ptr + row * splits + at, mask=at < splits, other=V)
        token = tl.min(tl.where(tops == best, firsts, V), 0)
    else:
        if COUNTERS:
            counter = draw_ptr + row * 3
            uniform = _uniform(tl.load(counter), tl.load(counter + 1), tl.load(counter + 2))
        else:
            uniform = tl.load(draw_ptr + row)
        warm = tl.load(part + 2, mask=at < splits, other=0.0) * tl.exp((tops - shift) * rate)
        sums = tl.cumsum(warm.to(tl.float64), 0)
        goal = uniform * tl.max(sums, 0)
        # The share where the running sum first exceeds the goal; rounding may let none: then the last that has mass.
        split = tl.min(tl.where(sums > goal, at, SPLITS), 0)
        split = tl.where(split == SPLITS, tl.max(tl.where(warm > 0.0, at, 0), 0), split)
        running = tl.max(tl.where(at < split, sums, 0.0), 0)
        token, last = tl.full((), -1, tl.int32), tl.full((), 0, tl.int32)
        for first in range(split * share, tl.minimum((split + 1) * share, V), BLOCK):
            cols = first + tl.arange(0, BLOCK)
            x = tl.load(logit_ptr + row * stride + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
            weight = tl.exp((x - shift) * rate)
            inside = running + tl.cumsum(weight.to(tl.float64), 0)
            here = tl.min(tl.where((inside > goal) & (weight > 0.0), cols, V), 0)
            token = tl.where((token < 0) & (here < V), here, token)
            last = tl.maximum(last, tl.max(tl.where(weight > 0.0, cols, 0), 0))
            running = tl.max(inside, 0)
        token = tl.where(token < 0, last, token)
    token = tl.minimum(token, V - 1)
    rest = tl.log(total)
    drawn = tl.load(logit_ptr + row * stride + token).to(tl.float32)
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(out_ptr + row, (drawn - best) - rest)
    tl.store(out_ptr + rows + row, -rest + (best - best))
