"""Launches of the attention kernels: tiles and splits from host-known sizes, one or two passes, a merge."""

from __future__ import annotations

import torch
from torch import Tensor

from prm_search.triton_kernels import launch, tiles
from prm_search.triton_kernels.calls import AttentionCall
from prm_search.triton_kernels.tiles import AttentionSchedule

_LOG2E = 1.4426950408889634
_MERGE_ROWS = 8
_COPY_BLOCK = 1024


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with a contiguous last dimension: a copy of the new tokens, never of a pool."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def schedule_of(call: AttentionCall) -> AttentionSchedule:
    """Tiles and splits of a call."""
    prefix, kv_heads = call.prefix, call.k_pool.shape[1]
    groups = 0 if prefix is None or call.window is not None else prefix.group_rows.shape[0] - 1
    return tiles.attention_schedule(
        capability=launch.capability(call.q.device),
        slots=launch.processors(call.q.device),
        half=call.q.dtype != torch.float32,
        rows=call.rows,
        kv_heads=kv_heads,
        group=call.q.shape[1] // kv_heads,
        head_dim=max(call.k_pool.shape[2], call.v_pool.shape[2]),
        max_new=call.longest_new,
        max_path=call.longest_path,
        groups=max(groups, 0),
        max_group_tokens=0 if prefix is None else min(prefix.max_group_tokens, call.tokens),
        max_prefix=0 if prefix is None else min(prefix.max_length, call.longest_path),
    )


def forward(call: AttentionCall) -> Tensor:
    """The Triton launches of `tree_attention`."""
    (tokens, heads, dk), (_, kv_heads, dv) = call.q.shape, call.v_pool.shape
    out = call.q.new_empty(tokens, heads, dv)
    if tokens == 0 or call.rows == 0:
        return out.zero_()
    from prm_search.triton_kernels import _jit_attention as jit

    schedule = schedule_of(call)
    q, k_pool, v_pool, table, path_lens, q_starts, scale, softcap, window, sinks, _, _, prefix = call
    q, table = _rows(q), table if table.stride(1) == 1 else table.contiguous()
    splits = schedule.splits + schedule.prefix_splits
    partial = splits > 1
    parts = stats = out
    if partial:
        parts = q.new_empty((splits, tokens, heads, dv), dtype=torch.float32)
        stats = q.new_empty((splits, tokens, heads, 2), dtype=torch.float32)
    group_rows, lengths = (path_lens, path_lens) if prefix is None else (prefix.group_rows, prefix.lengths)
    sink = q if sinks is None else sinks.contiguous()
    # (scale, cap, factor, sink_scale): the kernel's scores are raw products, or capped scores where there is a cap.
    unit = 1.0 if softcap is not None else scale
    factor, sink_scale = unit * _LOG2E, 1.0 / unit
    numbers = (scale, 1.0 if softcap is None else float(softcap), factor, sink_scale)

    def run(mode: int, tile: tiles.AttentionTile, query_tiles: int, segments: int, share: int, first: int) -> None:
        launch.launch(
            jit.attention_kernel, (query_tiles * segments * share, kv_heads), q.device,
            q, k_pool, v_pool, out, parts, stats, table, path_lens.contiguous(), q_starts.contiguous(),
            group_rows, lengths, sink, *q.stride()[:2], *k_pool.stride()[:2], *v_pool.stride()[:2],
            table.stride(0), tokens, heads, query_tiles, share, first, *numbers, window or 0,
            G=heads // kv_heads, DK=dk, DV=dv, BDK=tiles.padded(dk), BDV=tiles.padded(dv),
            HAS_CAP=softcap is not None, HAS_WINDOW=window is not None, HAS_SINKS=sinks is not None, PARTIAL=partial,
            PASS=mode, PRECISION="ieee" if q.dtype == torch.float32 else "tf32", BM=tile.m, BN=tile.n,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    own = 2 if schedule.prefix_splits else 0
    run(own, schedule.tile, schedule.query_tiles, call.rows, schedule.splits, schedule.prefix_splits)
    if schedule.prefix_splits:
        groups = group_rows.shape[0] - 1
        run(1, schedule.prefix_tile, schedule.prefix_query_tiles, groups, schedule.prefix_splits, 0)
    if partial:
        rows = tokens * heads
        launch.launch(
            jit.merge_kernel, (-(-rows // _MERGE_ROWS),), q.device, parts, stats, sink, out, rows, heads, splits,
            factor, sink_scale,
            HAS_SINKS=sinks is not None, DV=dv, BDV=tiles.padded(dv), BR=_MERGE_ROWS, num_warps=4,
        )  # fmt: skip
    return out


def copy_kv(k_pool: Tensor, v_pool: Tensor, k_new: Tensor, v_new: Tensor, slots: Tensor) -> None:
    """The Triton launch of `write_kv`, arguments unchecked."""
    if k_new.shape[0] == 0:
        return
    from prm_search.triton_kernels import _jit_attention as jit

    k_new, v_new = _rows(k_new), _rows(v_new)
    launch.launch(
        jit.write_kv_kernel, (k_new.shape[0],), k_pool.device, k_pool, v_pool, k_new, v_new, slots.contiguous(),
        *k_pool.stride()[:2], *v_pool.stride()[:2], *k_new.stride()[:2], *v_new.stride()[:2], k_pool.shape[1],
        DK=k_pool.shape[2], DV=v_pool.shape[2], BLOCK=_COPY_BLOCK, num_warps=4,
    )  # fmt: skip
