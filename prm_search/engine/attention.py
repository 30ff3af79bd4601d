"""Attention of packed new tokens over the slots of their branches, behind transformers' attention interface.

One forward takes the new tokens of many branches end to end (`input_ids [1, T]`), without padding and without a
mask. In each layer the keys and values of all T tokens are written to their slots first and then every branch
attends over its whole path, so a branch and its own ancestors may be encoded in the same forward.

transformers finds the attention function by a name in the model's config. `packed(...)` swaps that name inside our
own call only; a thread that is not in such a call, also one whose model shares the config, gets what the model's
original name stands for.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .pool import KVPool

PREFIX = "prm_search_over_"


@dataclass
class Unit:
    """New tokens that follow one path: the last `new` of `path`'s slots."""

    path: np.ndarray  # [S] int64 slots, the new tokens' own included
    new: int


class Group:
    """Units of similar shape, attended to together as one padded batch.

    Args:
        units: B units.
        start: packed position of the first unit's first new token; the others follow end to end.
    """

    def __init__(self, units: Sequence[Unit], start: int) -> None:
        self.units = units
        self.new = np.array([u.new for u in units])
        self.full = np.array([len(u.path) for u in units])
        self.start, self.stop = start, start + int(self.new.sum())
        self.length = int(self.new.max())
        self.even = bool((self.new == self.length).all())
        self.fresh = self.even and bool((self.full == self.new).all())  # nothing before the new tokens
        self._tables: dict[tuple[int | None, torch.device], tuple[torch.Tensor, torch.Tensor | None]] = {}
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

    def real(self) -> np.ndarray:
        """[B, L] bool: which of `rows` are not padding."""
        return np.arange(self.length)[None, :] < self.new[:, None]

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


def group_units(units: Sequence[Unit]) -> tuple[list[Group], list[int]]:
    """Cut units into groups whose padding stays small.

    Returns:
        the groups, and the order in which they take the units (indices into `units`).
    """
    order = sorted(range(len(units)), key=lambda i: (units[i].new.bit_length(), len(units[i].path), i))
    groups: list[Group] = []
    batch: list[int] = []
    taken, start = [], 0
    work = longest = widest = 0

    def close() -> None:
        nonlocal batch, start, work, longest, widest
        if batch:
            groups.append(Group([units[i] for i in batch], start))
            start, batch, work, longest, widest = groups[-1].stop, [], 0, 0, 0

    for i in order:
        new, full = units[i].new, len(units[i].path)
        fresh = new == full
        padded = (len(batch) + 1) * max(longest, new) * max(widest, full)
        if batch:
            last = units[batch[-1]]
            mixed = fresh != (last.new == len(last.path)) or (fresh and new != last.new)
            if mixed or padded > 1.25 * (work + new * full) + 8192:
                close()
        batch.append(i)
        taken.append(i)
        work, longest, widest = work + new * full, max(longest, new), max(widest, full)
    close()
    return groups, taken


class Packed:
    """One packed forward, as its attention layers see it.

    Args:
        pool: where keys and values live.
        slots: [T] int64 slot of each packed token.
        groups: the units, cut as group_units does.
    """

    def __init__(self, pool: KVPool, slots: np.ndarray, groups: Sequence[Group]) -> None:
        self.pool = pool
        self.groups = groups
        self._slots = torch.from_numpy(slots)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        softcap: float | None,
        window: int | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Write K and V, then attend.

        Args:
            query: [1, heads, T, k_dim].
            key, value: [1, kv_heads, T, k_dim or v_dim].
            scale: factor on the scores.
            softcap: scores become softcap * tanh(scores / softcap); None for none.
            window: see Group.tables.
            sinks: [heads] logits that take part in the softmax and carry no value; None for none.

        Returns:
            [1, T, heads, v_dim].
        """
        if self._slots.device != key.device:
            self._slots = self._slots.to(key.device)
        keys, values = self.pool.write(layer, self._slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
        out = query.new_empty((1, query.shape[2], query.shape[1], value.shape[-1]))
        plain = softcap is None and sinks is None
        for group in self.groups:
            count, span = len(group.units), slice(group.start, group.stop)
            if group.even:
                q = query[0, :, span].unflatten(1, (count, group.length)).transpose(0, 1)
            else:
                q = query[0][:, group.rows(query.device)].transpose(0, 1)
            if group.fresh and plain and (window is None or window >= group.length):
                k = key[0, :, span].unflatten(1, (count, group.length)).transpose(0, 1)
                v = value[0, :, span].unflatten(1, (count, group.length)).transpose(0, 1)
                result = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            else:
                slots, allowed = group.tables(window, query.device)
                k = keys.index_select(0, slots.view(-1)).view(*slots.shape, *keys.shape[1:]).transpose(1, 2)
                v = values.index_select(0, slots.view(-1)).view(*slots.shape, *values.shape[1:]).transpose(1, 2)
                if plain:
                    bias = group.bias(window, q.device, q.dtype)
                    result = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=True)
                else:
                    result = _eager(q, k, v, allowed, scale, softcap, sinks)
            rows = result.transpose(1, 2)  # [B, L, heads, v_dim]
            if group.even:
                out[0, span] = rows.flatten(0, 1)
            else:
                out[0, span] = rows[torch.from_numpy(group.real()).to(rows.device)]
        return out


def _eager(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    allowed: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """q [B, H, L, Dk], k [B, Hkv, S, Dk], v [B, Hkv, S, Dv]: softmax in fp32 (fp64 stays), as HF's eager attention."""
    heads, shared = q.shape[1], q.shape[1] // k.shape[1]
    grouped = q.unflatten(1, (heads // shared, shared))  # [B, Hkv, G, L, Dk]
    scores = torch.matmul(grouped, k.unsqueeze(2).transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if allowed is not None:
        scores = scores.masked_fill(~allowed[:, None, None], -math.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, heads // shared, shared, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.matmul(weights.to(v.dtype), v.unsqueeze(2)).flatten(1, 2)


# --- the switch ----------------------------------------------------------------------------------------------------

_here = threading.local()  # .packed: the forward this thread is in, if any


def _original(name: str, module: torch.nn.Module) -> Callable[..., Any]:
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get(name, eager)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    packed: Packed | None = getattr(_here, "packed", None)
    if packed is None:
        name = module.config._attn_implementation.removeprefix(PREFIX)
        return _original(name, module)(module, query, key, value, attention_mask, **kwargs)
    scale = kwargs.get("scaling")
    out = packed.attend(
        module.layer_idx,
        query,
        key,
        value,
        query.shape[-1] ** -0.5 if scale is None else float(scale),
        kwargs.get("softcap"),
        kwargs.get("sliding_window"),
        kwargs.get("s_aux"),
    )
    return out, None


def _mask_for(name: str) -> Callable[..., Any]:
    def mask(*args: Any, **kwargs: Any) -> Any:
        if getattr(_here, "packed", None) is not None:
            return None
        return ALL_MASK_ATTENTION_FUNCTIONS[name](*args, **kwargs)

    return mask


def _registered(name: str) -> str:
    """Our name over an original implementation's, registered with transformers on first use."""
    ours = PREFIX + name
    if ours not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(ours, _attention)
        AttentionMaskInterface.register(ours, _mask_for(name))
    return ours


_switch = threading.Lock()
_switched: dict[int, tuple[int, str]] = {}  # id of a config -> (calls inside, its original implementation)


@contextmanager
def packed(configs: Sequence[Any], forward: Packed) -> Iterator[None]:
    """Run the attention of every module that reads one of these configs as part of `forward`, in this thread.

    Args:
        configs: the config objects of the model's modules (each once).
        forward: what the layers shall do.
    """
    with _switch:
        for config in configs:
            inside, name = _switched.get(id(config), (0, config._attn_implementation_internal or "eager"))
            _switched[id(config)] = inside + 1, name
            config._attn_implementation_internal = _registered(name)
    _here.packed = forward
    try:
        yield
    finally:
        _here.packed = None
        with _switch:
            for config in configs:
                inside, name = _switched.pop(id(config))
                if inside > 1:
                    _switched[id(config)] = inside - 1, name
                else:
                    config._attn_implementation_internal = name
