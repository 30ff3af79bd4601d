"""`tree_attention`: packed new tokens attend over their paths in a slot pool. `write_kv` fills the slots."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prm_search.triton_kernels import _attention_launch, launch, reference, tiles
from prm_search.triton_kernels.calls import AttentionCall, SharedPrefix
from prm_search.triton_kernels.launch import Backend, Choice


def tree_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    *,
    slot_table: Tensor,
    path_lens: Tensor,
    q_starts: Tensor,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    max_new: int | None = None,
    max_path: int | None = None,
    prefix: SharedPrefix | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Causal attention of each row's new tokens over the row's whole path, its own new tokens included.

    Row b's queries are `q[q_starts[b]:q_starts[b + 1]]`, the last positions of a path of `path_lens[b]` slots; the key
    at position j of the path lies in slot `slot_table[b, j]`, already written (`write_kv`). Positions are ordinal in
    the path. Query head h reads KV head `h // (Hq // Hkv)`. Per query at position i and key at j:

        s = scale * (q_i . k_j);   s = softcap * tanh(s / softcap);   visible: j <= i and j > i - window
        out_i = sum_j exp(s_j) v_j / (sum_j exp(s_j) + exp(sink))

    Nothing here waits for the device: pass `max_new` and `max_path`, which the host knows.

    Args:
        q: `[T, Hq, Dk]` float16, bfloat16 or float32; head dimensions up to 256 (Triton), Dk and Dv may differ.
        k_pool: `[slots, Hkv, Dk]` of q's dtype, Hkv a divisor of Hq.
        v_pool: `[slots, Hkv, Dv]` of q's dtype.
        slot_table: `[B, S]` int32; entries at or past the row's path length are never read.
        path_lens: `[B]` int32, slots of each row's path with its new tokens. A row of 0 slots gives zeros.
        q_starts: `[B + 1]` int32, from 0 to T.
        scale: of the dot product, above 0, usually `Dk ** -0.5`.
        softcap: above 0.
        window: a query sees itself and the `window - 1` positions before it.
        sinks: `[Hq]`, one logit a head that takes probability and gives no value.
        max_new: at least every row's new tokens; None means T.
        max_path: at least every path length; None means S.
        prefix: rows whose paths share their first slots. Their keys are then read once for the group, where that pays
            (few new tokens a row, `tiles.prefix_pays`) and there is no window; the torch backend ignores it.
        backend: "auto" takes Triton on CUDA operands that it supports, else torch; `choice(tree_attention, ...)` tells.

    Returns:
        `[T, Hq, Dv]` in q's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit, or backend="triton" is impossible (also where a
            gradient is needed: Triton's path has no backward).
        TypeError: an operand is not a tensor.
    """
    call = AttentionCall(
        q, k_pool, v_pool, slot_table, path_lens, q_starts, scale, softcap, window, sinks, max_new, max_path, prefix
    )
    if _plan(call, backend).backend == "torch":
        return reference.tree_attention(call)
    if torch.compiler.is_compiling():
        from prm_search.triton_kernels import compiled

        return compiled.tree_attention(*call[:-1], *((None, None, 0, 0) if prefix is None else prefix))
    return _attention_launch.forward(call)


def write_kv(
    k_pool: Tensor, v_pool: Tensor, k_new: Tensor, v_new: Tensor, slots: Tensor, *, backend: Backend = "auto"
) -> None:
    """Write each token's keys and values into its slot, in place; a token with a negative slot is skipped.

    Args:
        k_pool, v_pool: `[slots, Hkv, Dk]` and `[slots, Hkv, Dv]`.
        k_new, v_new: `[T, Hkv, Dk]` and `[T, Hkv, Dv]` of the pools' dtype.
        slots: `[T]` int32 or int64, no slot twice.
        backend: as in `tree_attention`; neither waits for the device.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or backend="triton" is impossible.
        TypeError: an operand is not a tensor.
    """
    if _plan_write(k_pool, v_pool, k_new, v_new, slots, backend=backend).backend == "torch":
        reference.write_kv(k_pool, v_pool, k_new, v_new, slots)
    elif torch.compiler.is_compiling():
        from prm_search.triton_kernels import compiled

        compiled.write_kv(k_pool, v_pool, k_new, v_new, slots)
    else:
        _attention_launch.copy_kv(k_pool, v_pool, k_new, v_new, slots)


# ------------------------------------------------------------------------------------------ checks and the choice


def _check_pools(k_pool: Tensor, v_pool: Tensor) -> None:
    launch.check_matrix("k_pool", k_pool, 3)
    launch.check_matrix("v_pool", v_pool, 3)
    if k_pool.shape[:2] != v_pool.shape[:2]:
        raise ValueError(
            f"k_pool is {list(k_pool.shape)} and v_pool {list(v_pool.shape)}; slots and KV heads must agree"
        )
    _check_same("k_pool", k_pool, "v_pool", v_pool)


def _check_same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype or tensor.device != other.device:
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device} and {other_name} {other.dtype} on {other.device}; "
            "they must agree"
        )


def _check(call: AttentionCall) -> None:
    q, k_pool, v_pool, slot_table, path_lens, q_starts, scale, softcap, window, sinks, _, _, prefix = call
    launch.check_matrix("q", q, 3)
    _check_pools(k_pool, v_pool)
    _check_same("q", q, "k_pool", k_pool)
    if q.shape[2] != k_pool.shape[2]:
        raise ValueError(f"q is {list(q.shape)} and k_pool {list(k_pool.shape)}; the head dimensions must agree")
    if k_pool.shape[1] == 0 or q.shape[1] % k_pool.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads; a multiple of k_pool's {k_pool.shape[1]} KV heads is needed")
    if not isinstance(slot_table, Tensor) or slot_table.ndim != 2:
        raise ValueError(f"slot_table must be a [B, S] tensor, got {getattr(slot_table, 'shape', slot_table)!r}")
    rows = slot_table.shape[0]
    launch.check_index("slot_table", slot_table, tuple(slot_table.shape), q.device)
    launch.check_index("path_lens", path_lens, (rows,), q.device)
    launch.check_index("q_starts", q_starts, (rows + 1,), q.device)
    launch.check_positive("scale", scale)
    launch.check_positive("softcap", softcap)
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; None or at least 1 is needed")
    if sinks is not None:
        launch.check_matrix("sinks", sinks, 1)
        if sinks.shape[0] != q.shape[1] or sinks.device != q.device:
            raise ValueError(
                f"sinks is {list(sinks.shape)} on {sinks.device}; [{q.shape[1]}] (one a query head) on {q.device} "
                "is needed"
            )
    if prefix is not None:
        launch.check_index("prefix.group_rows", prefix.group_rows, tuple(prefix.group_rows.shape[:1]), q.device)
        launch.check_index("prefix.lengths", prefix.lengths, (rows,), q.device)
        if prefix.group_rows.shape[0] < 1:
            raise ValueError("prefix.group_rows is empty; the first row of each group and B are needed")


def _plan(call: AttentionCall, backend: str) -> Choice:
    _check(call)
    why_not = None
    if backend != "torch":
        floating = call.q, call.k_pool, call.v_pool
        why_not = launch.obstacle(*floating) or launch.gradient_obstacle(*floating)
        widest = max(call.k_pool.shape[2], call.v_pool.shape[2])
        if why_not is None and widest > tiles.MAX_HEAD_DIM:
            why_not = f"a head dimension is {widest}; at most {tiles.MAX_HEAD_DIM} is supported"
        why_not = why_not or _strided(k_pool=call.k_pool, v_pool=call.v_pool)
    return launch.decide("tree_attention", backend, why_not, call.q)


def _describe(*operands: Any, backend: Backend = "auto", **options: Any) -> Choice:
    """`choice(tree_attention, ...)`: the plan, with the schedule in words."""
    call = AttentionCall(*operands, **options)
    plan = _plan(call, backend)
    return plan if plan.backend == "torch" else replace(plan, detail=str(_attention_launch.schedule_of(call)))


def _plan_write(
    k_pool: Tensor, v_pool: Tensor, k_new: Tensor, v_new: Tensor, slots: Tensor, *, backend: Backend = "auto"
) -> Choice:
    _check_pools(k_pool, v_pool)
    for name, new, pool in (("k_new", k_new, k_pool), ("v_new", v_new, v_pool)):
        launch.check_matrix(name, new, 3)
        _check_same(name, new, "the pools", pool)
        if new.shape[1:] != pool.shape[1:]:
            raise ValueError(f"{name} is {list(new.shape)}; [T, {pool.shape[1]}, {pool.shape[2]}] is needed")
    if k_new.shape[0] != v_new.shape[0]:
        raise ValueError(f"k_new has {k_new.shape[0]} tokens and v_new {v_new.shape[0]}; they must agree")
    launch.check_index("slots", slots, (k_new.shape[0],), k_pool.device)
    why_not = None
    if backend != "torch":
        why_not = launch.obstacle(k_pool, v_pool, k_new, v_new) or launch.gradient_obstacle(k_pool, k_new, v_new)
        why_not = why_not or _strided(k_pool=k_pool, v_pool=v_pool)
    return launch.decide("write_kv", backend, why_not, k_pool)


def _strided(**pools: Tensor) -> str | None:
    for name, pool in pools.items():
        if pool.stride(2) != 1:
            return f"{name} has strides {pool.stride()}; its last dimension must be contiguous"
    return None


launch.register(tree_attention, _describe)
launch.register(write_kv, _plan_write)
