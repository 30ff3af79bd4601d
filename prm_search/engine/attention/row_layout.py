"""The torch path of attention for rows that grow by one token each: its tables grow with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from .layout import Group, Operands, QueryRun, buckets, flash, group_units, one_query
from .own_rows import OwnRows, Room
from .torch_layout import SHARED_FROM, Prefixes

# Numbers of K that rows of a family would read again, from which the second attention and the merge cost less.
WORTH_SHARING = 1 << 17

if TYPE_CHECKING:
    from ..growth import Growth
    from ..pool import KVPool


class RowPlan:
    """The part of a layout that lasts as long as the same rows grow together.

    Args:
        growth: live; its plan until now, if any, leaves its mirrors to this one.
        pool: where the keys and values live.

    Attributes:
        version: of the growth that it was made for.
        prefixes: read once for each family.
        groups: the rows, and what they read each for itself.
    """

    def __init__(self, growth: Growth, pool: KVPool) -> None:
        self.version = growth.version
        stems, places = np.unique(growth.stems, return_inverse=True)
        sizes = np.bincount(places, minlength=len(stems))
        kin = (sizes[places] > 1) & (growth.shared >= SHARED_FROM)
        kin &= (sizes[places] - 1) * growth.shared * pool.width >= WORTH_SHARING
        offset = np.where(kin, growth.shared, 0)
        self.prefixes: list[_Prefix] = []
        families = [np.flatnonzero(kin & (places == family)) for family in np.flatnonzero(sizes > 1)]
        families = [members for members in families if len(members)]
        paths = [growth.paths[members[0], : growth.shared[members[0]]] for members in families]
        if families:
            for batch in buckets([(len(members), len(path)) for members, path in zip(families, paths, strict=True)]):
                self.prefixes.append(_Prefix([paths[i] for i in batch], [families[i] for i in batch], len(kin)))
        own, room = growth.length - offset, Room(pool.bytes() // 2)
        self.groups = [
            OwnRows(np.array(sorted(batch)), growth, offset, room)
            for kind in (kin, ~kin)
            if kind.any()
            for batch in _numbered(np.flatnonzero(kind), buckets([(1, int(n)) for n in own[kind]]))
        ]
        if growth.plan is not None:
            for group in growth.plan.groups:
                group.forget_elders()
            for group in self.groups:
                group.inherit(growth.plan.groups)

    def grow(self) -> None:
        """Take every row's newest token in."""
        for group in self.groups:
            group.forget_elders()
            group.grow()


def _numbered(places: np.ndarray, batches: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[int(places[i]) for i in batch] for batch in batches]


class _Prefix:
    """The shared prefixes of some families; see Prefixes. A run of neighbouring slots is read where it lies."""

    def __init__(self, paths: Sequence[np.ndarray], members: Sequence[np.ndarray], rows: int) -> None:
        self.padded = Prefixes(paths, [part.tolist() for part in members])
        path = paths[0]
        near = len(paths) == 1 and bool((np.diff(path) == 1).all())
        self.run = slice(int(path[0]), int(path[-1]) + 1) if near else None
        self.everyone = len(paths) == 1 and len(members[0]) == rows
        self._bias: dict[torch.dtype, torch.Tensor | None] = {}

    def bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        if dtype not in self._bias:
            self._bias[dtype] = self.padded.bias(dtype)
        return self._bias[dtype]

    def read(self, pool: torch.Tensor) -> torch.Tensor:
        """[F, kv_heads, P, dim] of keys or values."""
        if self.run is not None:
            return pool[self.run].transpose(0, 1)[None]
        slots = self.padded.slots
        return pool.index_select(0, slots.view(-1)).view(*slots.shape, *pool.shape[1:]).transpose(1, 2)


class RowLayout:
    """Attention of one new token for each row of a growth, in the rows' order.

    Args:
        growth: live, with the new tokens' slots in its paths.
        pool: where the keys and values live.
    """

    def __init__(self, growth: Growth, pool: KVPool) -> None:
        if growth.plan is None or growth.plan.version != growth.version:
            growth.plan = RowPlan(growth, pool)
        else:
            growth.plan.grow()
        self._plan: RowPlan = growth.plan
        self._growth = growth
        self._longest = int(growth.length.max())
        self._whole: tuple[list[Group], torch.Tensor] | None = None

    def attend(self, operands: Operands) -> torch.Tensor:
        """As TorchLayout.attend."""
        query, _, value, keys, values, modifiers, layer = operands
        window = modifiers.window is not None and modifiers.window < self._longest
        if query.device.type != "cpu" or modifiers.softcap is not None or modifiers.sinks is not None or window:
            return self._one_by_one(operands)
        if query.shape[-1] != values.shape[-1]:
            return self._one_by_one(operands)
        plan = self._plan
        out = weight = None
        for group in plan.groups:
            k, v = group.read(layer, keys, values)
            q = query if group.places is None else query.index_select(1, group.places)
            part, mass = one_query(q, k, v, group.bias(query.dtype), modifiers.scale)
            if group.places is None:
                out, weight = part, mass
            else:
                if out is None or weight is None:
                    out = query.new_empty((query.shape[1], query.shape[0], value.shape[-1]))
                    weight = mass.new_empty((query.shape[1], query.shape[0]))
                out[group.places], weight[group.places] = part, mass
        assert out is not None  # a growth has rows
        assert weight is not None
        for prefix in plan.prefixes:
            self._merge(prefix, operands, out, weight)
        return out

    @staticmethod
    def _merge(prefix: _Prefix, operands: Operands, out: torch.Tensor, weight: torch.Tensor) -> None:
        """Merge what rows see of their family's prefix into `out`, by the log-sum-exps."""
        query = operands.query
        k, v = prefix.read(operands.keys), prefix.read(operands.values)
        bias, scale = prefix.bias(query.dtype), operands.modifiers.scale
        if prefix.everyone:
            shared, mass = flash(query[None], k, v, bias, scale)
            part = torch.sigmoid(mass[0].T - weight)[..., None].to(out.dtype)
            out.lerp_(shared[0].transpose(0, 1), part)
            return
        rows, real = prefix.padded.rows, prefix.padded.real
        shared, mass = flash(query[:, rows].transpose(0, 1), k, v, bias, scale)
        rows = rows[real]
        shared, mass = shared.transpose(1, 2)[real], mass.transpose(1, 2)[real]
        part = torch.sigmoid(mass - weight[rows])[..., None].to(out.dtype)
        out[rows] = torch.lerp(out[rows], shared, part)

    def _one_by_one(self, operands: Operands) -> torch.Tensor:
        """Scores that cannot be merged, or not on a CPU: whole paths, as of any units."""
        if self._whole is None:
            paths, lengths = self._growth.paths, self._growth.length
            groups, order = group_units([QueryRun(path[:n], 1) for path, n in zip(paths, lengths, strict=True)])
            self._whole = groups, torch.tensor(order, device=operands.query.device)
        groups, at = self._whole
        packed = operands._replace(query=operands.query.index_select(1, at))
        packed = packed._replace(key=operands.key.index_select(1, at), value=operands.value.index_select(1, at))
        result = torch.cat([group.attend(packed) for group in groups])
        return torch.empty_like(result).index_copy_(0, at, result)
