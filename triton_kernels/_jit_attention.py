"""Triton kernels of `tree_attention` and `write_kv`. Import only where a launch is certain.

The rows of a tile are (token, query head) pairs: the G query heads that share a KV head are packed beside the tokens,
so one decoded token already gives the tensor cores G rows and every key is read once for all of them. Keys and values
are gathered from the pools by slot. The softmax runs online, fp32, in base 2: scores keep their own unit (the raw
product, or the capped score) and `factor` turns *differences* of them into powers of two: rounding does not grow with
the scores' size. A sink is brought to that unit by `sink_scale`.

With `PARTIAL` a program writes its unnormalised sums and (maximum, sum), fp32, and `merge_kernel` combines the splits
in a fixed order: splits of a long path (decode), or the pass over a shared prefix and the pass over a row's own keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _block(
    q, top, total, acc, k_ptr, v_ptr, slots, key0, hi, position,
    stride_ks, stride_vs, scale, softcap, factor, window, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BDK: tl.constexpr,
    BDV: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the keys [key0, key0 + BN), which lie in `slots`, into the running softmax of a tile.

    Without MASKED every row sees all of them.
    """
    keys = key0 + tl.arange(0, BN)
    dk = tl.arange(0, BDK)
    dv = tl.arange(0, BDV)
    slots = slots.to(tl.int64)
    k_ptrs = k_ptr + slots[None, :] * stride_ks + dk[:, None]
    if BDK != DK:
        k = tl.load(k_ptrs, mask=(dk[:, None] < DK) & (keys[None, :] < hi), other=0.0)
    elif MASKED:
        k = tl.load(k_ptrs, mask=keys[None, :] < hi, other=0.0)
    else:
        k = tl.load(k_ptrs)
    s = tl.dot(q, k, input_precision=PRECISION)
    if HAS_CAP:
        y = s * scale / softcap  # tanh(y) = sign(y) * (1 - e) / (1 + e) with e = exp(-2|y|)
        e = tl.exp2(tl.abs(y) * (-2.0 * LOG2E))
        t = (1.0 - e) / (1.0 + e)
        s = softcap * tl.where(y < 0, -t, t)
    if MASKED:
        visible = keys[None, :] < hi
        if CAUSAL:
            visible = visible & (keys[None, :] <= position[:, None])
        if HAS_WINDOW:
            visible = visible & (keys[None, :] > position[:, None] - window)
        s = tl.where(visible, s, -float("inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # a tile row that has seen no key yet
    p = tl.exp2((s - shift[:, None]) * factor)
    rescale = tl.exp2((top - shift) * factor)
    total = total * rescale + tl.sum(p, 1)
    v_ptrs = v_ptr + slots[:, None] * stride_vs + dv[None, :]
    # Values past `hi` must read as 0: 0 * (whatever an unwritten slot holds) may be nan.
    if BDV != DV:
        v = tl.load(v_ptrs, mask=(keys[:, None] < hi) & (dv[None, :] < DV), other=0.0)
    elif MASKED:
        v = tl.load(v_ptrs, mask=keys[:, None] < hi, other=0.0)
    else:
        v = tl.load(v_ptrs)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return new_top, total, acc


# Per-call sizes and the index tables' alignment are not specialised: each variant would be a compilation mid-search.
@triton.jit(
    do_not_specialize=["T", "tiles", "splits", "first_split", "window", "stride_table"],
    do_not_specialize_on_alignment=["table_ptr", "len_ptr", "start_ptr", "group_ptr", "prefix_ptr"],
)
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, part_ptr, stat_ptr, table_ptr, len_ptr, start_ptr, group_ptr, prefix_ptr, sink_ptr,
    stride_qt, stride_qh, stride_ks, stride_kh, stride_vs, stride_vh, stride_table,
    T, HQ, tiles, splits, first_split, scale, softcap, factor, sink_scale, window,
    G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BDK: tl.constexpr, BDV: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr, PARTIAL: tl.constexpr,
    PASS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * segments * splits, Hkv). PASS: 0 whole paths, 1 shared prefixes, 2 what follows the prefix.

    A segment is a row of the batch; in pass 1 a group of rows, whose queries are neighbours and share their first keys.
    """
    tile = tl.program_id(0) % tiles
    segment = (tl.program_id(0) // tiles) // splits
    split = (tl.program_id(0) // tiles) % splits
    kv_head = tl.program_id(1)

    row = segment
    last_row = segment + 1
    if PASS == 1:
        row = tl.load(group_ptr + segment).to(tl.int32)
        last_row = tl.load(group_ptr + segment + 1).to(tl.int32)
    q_lo = tl.load(start_ptr + row).to(tl.int32)
    new = tl.load(start_ptr + last_row).to(tl.int32) - q_lo
    if tile * BM >= new * G:
        return
    first_key = 0
    if PASS == 1:
        length = tl.load(prefix_ptr + row).to(tl.int32)
        old = length  # every key comes before every query
    else:
        length = tl.load(len_ptr + row).to(tl.int32)
        old = length - new
        if PASS == 2:
            first_key = tl.load(prefix_ptr + row).to(tl.int32)

    packed = tile * BM + tl.arange(0, BM)
    token = packed // G
    head = kv_head * G + packed % G
    live = token < new
    position = old + token
    # int64: a packed batch times its heads may pass 2^31 elements, a pool certainly does.
    q_row = (q_lo + token).to(tl.int64)
    dk = tl.arange(0, BDK)
    q_ptrs = q_ptr + q_row[:, None] * stride_qt + head[:, None] * stride_qh + dk[None, :]
    q = tl.load(q_ptrs, mask=live[:, None] & (dk[None, :] < DK), other=0.0)
    k_base = k_ptr + kv_head.to(tl.int64) * stride_kh
    v_base = v_ptr + kv_head.to(tl.int64) * stride_vh
    table = table_ptr + row.to(tl.int64) * stride_table

    # The split's share of the segment's keys, then the part of it that this tile's tokens can see.
    first_token = tile * BM // G
    last_token = tl.minimum((tile * BM + BM - 1) // G, new - 1)
    if HAS_WINDOW:
        first_key = tl.maximum(first_key, old - window + 1)
    share = tl.cdiv(tl.cdiv(tl.maximum(length - first_key, 0), splits), BN) * BN
    lo = first_key + split * share
    hi = tl.minimum(lo + share, length)
    if PASS != 1:
        hi = tl.minimum(hi, old + last_token + 1)
    if HAS_WINDOW:
        lo = tl.maximum(lo, old + first_token - window + 1)

    top = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    block = tl.arange(0, BN)
    # Slots are read one block ahead: keys gathered through a load of the same block leave nothing to overlap.
    slots = tl.load(table + lo + block, mask=lo + block < hi, other=0)
    clear = lo  # keys before `clear` are seen by every row of the tile: no mask to compute
    if not HAS_WINDOW:
        all_see = hi if PASS == 1 else tl.minimum(hi, old + first_token + 1)
        clear = lo + tl.maximum(all_see - lo, 0) // BN * BN
        for key0 in range(lo, clear, BN):
            ahead = key0 + BN + block
            following = tl.load(table + ahead, mask=ahead < hi, other=0)
            top, total, acc = _block(
                q, top, total, acc, k_base, v_base, slots, key0, hi, position, stride_ks, stride_vs, scale, softcap,
                factor, window, HAS_CAP, HAS_WINDOW, PASS != 1, False, DK, DV, BDK, BDV, BN, PRECISION,
            )  # fmt: skip
            slots = following
    for key0 in range(clear, hi, BN):
        ahead = key0 + BN + block
        following = tl.load(table + ahead, mask=ahead < hi, other=0)
        top, total, acc = _block(
            q, top, total, acc, k_base, v_base, slots, key0, hi, position, stride_ks, stride_vs, scale, softcap,
            factor, window, HAS_CAP, HAS_WINDOW, PASS != 1, True, DK, DV, BDK, BDV, BN, PRECISION,
        )  # fmt: skip
        slots = following

    dv = tl.arange(0, BDV)
    out_row = q_row * HQ + head
    keep = live[:, None] & (dv[None, :] < DV)
    if PARTIAL:
        plane = (first_split + split).to(tl.int64) * T * HQ
        tl.store(stat_ptr + (plane + out_row) * 2, top, mask=live)
        tl.store(stat_ptr + (plane + out_row) * 2 + 1, total, mask=live)
        tl.store(part_ptr + (plane + out_row[:, None]) * DV + dv[None, :], acc, mask=keep)
    else:
        if HAS_SINKS:
            sink = tl.load(sink_ptr + head, mask=live, other=0.0).to(tl.float32) * sink_scale
            new_top = tl.maximum(top, sink)
            rescale = tl.exp2((top - new_top) * factor)
            total = total * rescale + tl.exp2((sink - new_top) * factor)
            acc = acc * rescale[:, None]
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out_ptr + out_row[:, None] * DV + dv[None, :], acc.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["rows", "splits"])
def merge_kernel(
    part_ptr, stat_ptr, sink_ptr, out_ptr, rows, HQ, splits, factor, sink_scale, HAS_SINKS: tl.constexpr,
    DV: tl.constexpr, BDV: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(rows, BR),), rows = T * Hq: combine the splits' partial sums into out [T, Hq, Dv]."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    dv = tl.arange(0, BDV)
    live = row < rows
    keep = live[:, None] & (dv[None, :] < DV)
    row = row.to(tl.int64)
    top = tl.full([BR], -float("inf"), tl.float32)
    total = tl.zeros([BR], tl.float32)
    acc = tl.zeros([BR, BDV], tl.float32)
    if HAS_SINKS:
        top = tl.load(sink_ptr + row % HQ, mask=live, other=0.0).to(tl.float32) * sink_scale
        total += 1.0
    for split in range(splits):
        at = row + tl.full([BR], split, tl.int64) * rows
        other_top = tl.load(stat_ptr + at * 2, mask=live, other=0.0)
        other = tl.load(stat_ptr + at * 2 + 1, mask=live, other=0.0)
        part = tl.load(part_ptr + at[:, None] * DV + dv[None, :], mask=keep, other=0.0)
        new_top = tl.maximum(top, other_top)
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        ours = tl.exp2((top - shift) * factor)
        theirs = tl.exp2((other_top - shift) * factor)
        total = total * ours + other * theirs
        acc = acc * ours[:, None] + part * theirs[:, None]
        top = new_top
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_ptr + row[:, None] * DV + dv[None, :], acc.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _copy_heads(new_ptr, pool_ptr, stride_nh, stride_ph, H, D: tl.constexpr, BLOCK: tl.constexpr):
    for first in range(0, H * D, BLOCK):
        at = first + tl.arange(0, BLOCK)
        head = at // D
        keep = head < H
        value = tl.load(new_ptr + head * stride_nh + at % D, mask=keep)
        tl.store(pool_ptr + head * stride_ph + at % D, value, mask=keep)


@triton.jit(do_not_specialize_on_alignment=["slot_ptr"])
def write_kv_kernel(
    k_pool_ptr, v_pool_ptr, k_ptr, v_ptr, slot_ptr, stride_pk, stride_pkh, stride_pv, stride_pvh,
    stride_k, stride_kh, stride_v, stride_vh, H, DK: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (T,): one token's keys and values, all heads, to its slot; a negative slot is skipped."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    if slot < 0:
        return
    _copy_heads(k_ptr + token * stride_k, k_pool_ptr + slot * stride_pk, stride_kh, stride_pkh, H, DK, BLOCK)
    _copy_heads(v_ptr + token * stride_v, v_pool_ptr + slot * stride_pv, stride_vh, stride_pvh, H, DV, BLOCK)
