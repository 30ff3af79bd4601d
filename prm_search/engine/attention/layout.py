"""The layout of many branches' new tokens in one packed forward, and attention over it.

In each layer the keys and values of all T new tokens are written to their slots first and then every branch attends
over its whole path, so a branch and its own ancestors may be encoded in the same forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F


@dataclass
class QueryRun:
    """New tokens that follow one path.

    Attributes:
        path: [S] int64 slots, the new tokens' own included.
        new: how many of them, at the end, are new.
        stem: units with the same stem begin with the same `shared` slots.
        shared: how many; none of them is new.
    """

    path: np.ndarray
    new: int
    stem: int = 0
    shared: int = 0

    def run(self) -> slice | None:
        """The slots as a slice of the pool; None where they are no neighbours in order."""
        first, last = int(self.path[0]), int(self.path[-1])
        if last - first != len(self.path) - 1 or not bool((np.diff(self.path) == 1).all()):
            return None
        return slice(first, last + 1)


@dataclass(frozen=True)
class ScoreModifiers:
    """A layer's changes to its attention scores.

    Attributes:
        scale: factor on them.
        softcap: they become softcap * tanh(scores / softcap); None for none.
        window: a token sees itself and the window - 1 tokens before it; None for all.
        sinks: [heads] logits that take part in the softmax and carry no value; None for none.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    sinks: torch.Tensor | None = None


class Operands(NamedTuple):
    """The operands of a layer's attention.

    Attributes:
        query: [heads, T, k_dim] of the packed new tokens.
        key, value: [kv_heads, T, k_dim or v_dim] of the new tokens.
        keys, values: [slots, kv_heads, k_dim or v_dim], the new tokens included.
        modifiers: of the scores.
        layer: index of the layer, one for all that its pools hold.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    modifiers: ScoreModifiers
    layer: int = 0


class Group:
    """Units of similar shape, attended to together as one padded batch.

    Args:
        units: B units.
        start: packed position of the first unit's first new token; the others follow end to end.
    """

    def __init__(self, units: Sequence[QueryRun], start: int) -> None:
        self.units = units
        self.new = np.array([u.new for u in units])
        self.full = np.array([len(u.path) for u in units])
        self.start, self.stop = start, start + int(self.new.sum())
        self.length = int(self.new.max())
        self.even = bool((self.new == self.length).all())
        self.fresh = self.even and bool((self.full == self.new).all())  # nothing before the new tokens
        self._tables: dict[tuple[int | None, torch.device], tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._run = units[0].run() if len(units) == 1 else None
        self._bias: dict[tuple[int | None, torch.device, torch.dtype], torch.Tensor | None] = {}
        self._rows: dict[torch.device, torch.Tensor] = {}

    def rows(self, device: torch.device) -> torch.Tensor:
        """[B, L] packed positions of the new tokens, padded with each unit's first."""
        if device not in self._rows:
            first = self.start + np.concatenate(([0], np.cumsum(self.new)[:-1]))
            step = np.arange(self.length)[None, :]
            rows = np.where(step < self.new[:, None], first[:, None] + step, first[:, None])
            self._rows[device] = torch.from_numpy(rows).to(device)
        return self._rows[device]

    def real(self, device: torch.device) -> torch.Tensor:
        """[B, L] bool: which of `rows` are not padding."""
        return torch.from_numpy(np.arange(self.length)[None, :] < self.new[:, None]).to(device)

    def tables(self, window: int | None, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Slots to read and what each query may see of them.

        Args:
            window: a token sees itself and the window - 1 tokens before it; None for all.

        Returns:
            slots [B, S] int64 and allowed [B, L, S] bool (None where everything is).
        """
        key = (window, device)
        if key in self._tables:
            return self._tables[key]
        first_query = self.full - self.new
        low = np.zeros_like(self.full) if window is None else np.maximum(0, first_query + 1 - window)
        width = int((self.full - low).max())
        slots = np.empty((len(self.units), width), np.int64)
        for row, (unit, begin) in enumerate(zip(self.units, low, strict=True)):
            part = unit.path[begin:]
            slots[row, : len(part)] = part
            slots[row, len(part) :] = part[0]  # never read as anything: masked, but must hold finite numbers
        queries = (first_query[:, None] + np.minimum(np.arange(self.length), self.new[:, None] - 1))[:, :, None]
        keys = (low[:, None] + np.arange(width))[:, None, :]
        allowed = keys <= queries
        if window is not None:
            allowed &= keys > queries - window
        mask = None if allowed.all() else torch.from_numpy(allowed).to(device)
        self._tables[key] = torch.from_numpy(slots).to(device), mask
        return self._tables[key]

    def bias(self, window: int | None, device: torch.device, dtype: torch.dtype) -> torch.Tensor | None:
        """[B, 1, L, S] additive mask of `tables`: 0 where allowed, -inf elsewhere."""
        key = (window, device, dtype)
        if key not in self._bias:
            allowed = self.tables(window, device)[1]
            if allowed is not None:
                zeros = torch.zeros(allowed.shape, dtype=dtype, device=device)
                allowed = zeros.masked_fill_(~allowed, -math.inf)[:, None]
            self._bias[key] = allowed
        return self._bias[key]

    def attend(self, operands: Operands, mass: torch.Tensor | None = None) -> torch.Tensor:
        """[tokens, heads, v_dim] of this group's tokens.

        Args:
            operands: of all packed tokens.
            mass: [tokens, heads] to be filled with the log-sum-exps of the scores (CPU, plain scores).
        """
        query, key, value, keys, values, modifiers, _ = operands
        count, span = len(self.units), slice(self.start, self.stop)
        if self.even:
            q = query[:, span].unflatten(1, (count, self.length)).transpose(0, 1)
        else:
            q = query[:, self.rows(query.device)].transpose(0, 1)
        plain = modifiers.softcap is None and modifiers.sinks is None
        fresh = self.fresh and plain and (modifiers.window is None or modifiers.window >= self.length)
        weight = None
        if fresh:
            k = key[:, span].unflatten(1, (count, self.length)).transpose(0, 1)
            v = value[:, span].unflatten(1, (count, self.length)).transpose(0, 1)
        else:
            slots, allowed = self.tables(modifiers.window, query.device)
            k = keys.index_select(0, slots.view(-1)).view(*slots.shape, *keys.shape[1:]).transpose(1, 2)
            v = values.index_select(0, slots.view(-1)).view(*slots.shape, *values.shape[1:]).transpose(1, 2)
        if not plain:
            result = _eager(q, k, v, allowed, modifiers)
        else:
            bias = None if fresh else self.bias(modifiers.window, q.device, q.dtype)
            if mass is not None:
                result, weight = flash(q, k, v, bias, modifiers.scale, causal=fresh)
            else:
                result = _sdpa(q, k, v, bias, modifiers.scale, causal=fresh)
        if mass is not None and weight is not None:
            mass.copy_(self._packed(weight.transpose(1, 2)))
        return self._packed(result.transpose(1, 2))

    def attend_one(self, operands: Operands) -> torch.Tensor | None:
        """As `attend`, for one token alone whose path lies in neighbouring slots: where it lies. None for all else."""
        query, modifiers, run = operands.query, operands.modifiers, self._run
        if run is None or query.shape[1] != 1 or modifiers.softcap is not None or modifiers.sinks is not None:
            return None
        if modifiers.window is not None and modifiers.window < run.stop - run.start:
            run = slice(run.stop - modifiers.window, run.stop)
        k, v = (pool[run].transpose(0, 1)[None] for pool in (operands.keys, operands.values))
        return _sdpa(query[None], k, v, None, modifiers.scale, causal=False)[:, :, 0]

    def _packed(self, rows: torch.Tensor) -> torch.Tensor:
        """[B, L, ...] -> [tokens, ...] without the padding."""
        return rows.flatten(0, 1) if self.even else rows[self.real(rows.device)]


def buckets(shapes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Cut work into batches whose padding stays small.

    Args:
        shapes: queries and keys of each piece of work.

    Returns:
        batches of indices into shapes.
    """
    order = sorted(range(len(shapes)), key=lambda i: (shapes[i][0].bit_length(), shapes[i][1], i))
    batches: list[list[int]] = []
    work = longest = widest = 0
    for i in order:
        queries, keys = shapes[i]
        fresh = queries == keys  # nothing before the new tokens: only equals batch, so that no mask is needed
        padded = (len(batches[-1]) + 1 if batches else 1) * max(longest, queries) * max(widest, keys)
        if batches:
            last = shapes[batches[-1][-1]]
            mixed = fresh != (last[0] == last[1]) or (fresh and queries != last[0])
            if not mixed and padded <= 1.25 * (work + queries * keys) + 8192:
                batches[-1].append(i)
                work, longest, widest = work + queries * keys, max(longest, queries), max(widest, keys)
                continue
        batches.append([i])
        work, longest, widest = queries * keys, queries, keys
    return batches


def group_units(units: Sequence[QueryRun], start: int = 0) -> tuple[list[Group], list[int]]:
    """Groups of similar units, packed from position `start` on.

    Returns:
        the groups, and the order in which they take the units (indices into `units`).
    """
    groups: list[Group] = []
    taken: list[int] = []
    for batch in buckets([(unit.new, len(unit.path)) for unit in units]):
        groups.append(Group([units[i] for i in batch], start))
        start = groups[-1].stop
        taken += batch
    return groups, taken


def flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float, causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its log-sum-exp on the CPU: [B, H, L, D] and [B, H, L] fp32 (fp64 for fp64)."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, mass = flash(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    return out, mass


def one_query(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`flash` for one query a row: q [H, B, D], k and v [B, Hkv, S, D] -> [B, H, D], and log-sum-exps [B, H].

    The query heads that share a KV head become its queries, so K and V are read once.
    """
    rows, kv_heads, heads = k.shape[0], k.shape[1], q.shape[0]
    packed = q.transpose(0, 1).reshape(rows, kv_heads, heads // kv_heads, q.shape[2])
    out, mass = flash(packed, k, v, bias, scale)
    return out.reshape(rows, heads, v.shape[3]), mass.reshape(rows, heads)


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float, causal: bool
) -> torch.Tensor:
    """q [B, H, L, Dk], k [B, Hkv, S, Dk], v [B, Hkv, S, Dv], bias [B, 1, L, S] -> [B, H, L, Dv]."""
    if q.shape[2] > 1 or causal:
        return F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal, scale=scale, enable_gqa=True)
    # One new token: the query heads that share a KV head become its queries, so K and V are read once.
    heads = q.shape[1]
    packed = q.reshape(q.shape[0], k.shape[1], heads // k.shape[1], q.shape[3])
    return F.scaled_dot_product_attention(packed, k, v, attn_mask=bias, scale=scale).reshape(-1, heads, 1, v.shape[3])


def _eager(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor | None, modifiers: ScoreModifiers
) -> torch.Tensor:
    """q [B, H, L, Dk], k [B, Hkv, S, Dk], v [B, Hkv, S, Dv]: softmax in fp32 (fp64 stays), as HF's eager attention."""
    heads, shared = q.shape[1], q.shape[1] // k.shape[1]
    grouped = q.unflatten(1, (heads // shared, shared))  # [B, Hkv, G, L, Dk]
    scores = torch.matmul(grouped, k.unsqueeze(2).transpose(-1, -2)) * modifiers.scale
    if modifiers.softcap is not None:
        scores = modifiers.softcap * torch.tanh(scores / modifiers.softcap)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if allowed is not None:
        scores = scores.masked_fill(~allowed[:, None, None], -math.inf)
    if modifiers.sinks is not None:
        column = modifiers.sinks.to(scores.dtype).view(1, heads // shared, shared, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.matmul(weights.to(v.dtype), v.unsqueeze(2)).flatten(1, 2)
