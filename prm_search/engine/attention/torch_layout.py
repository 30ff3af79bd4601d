"""The torch path of packed attention: groups by SDPA, prefixes that units share read once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from .layout import Group, Operands, QueryRun, buckets, flash, group_units

SHARED_FROM = 32  # tokens of a prefix from which reading it once pays for the second attention and the merge


class TorchLayout:
    """Units in groups of similar shape, attended to by SDPA: the path of the CPU, and of what Triton does not serve.

    Units that begin with the same slots are families. Where the scores allow it, a family's shared prefix is read once
    for all its queries, and merged with what each unit sees of its own by their log-sum-exps.

    Args:
        units: what is new.

    Attributes:
        order: the order in which the packed tokens take the units.
    """

    def __init__(self, units: Sequence[QueryRun]) -> None:
        self.kin: Siblings | None = None
        if len(units) == 1:
            self.groups, self.order = [Group(units, 0)], [0]
            return
        stems: dict[int, list[int]] = {}
        for i, unit in enumerate(units):
            if unit.shared >= SHARED_FROM:
                stems.setdefault(unit.stem, []).append(i)
        kin = sorted(i for members in stems.values() if len(members) > 1 for i in members)
        alone = sorted(set(range(len(units))) - set(kin))
        self.groups, order = group_units([units[i] for i in alone])
        self.order = [alone[i] for i in order]
        if kin:
            self.kin = Siblings([units[i] for i in kin], self.groups[-1].stop if self.groups else 0)
            self.order += [kin[i] for i in self.kin.order]

    def tables(self) -> list[np.ndarray]:
        """Nothing: the groups make theirs as they need them."""
        return []

    def place(self, tables: list[torch.Tensor]) -> None:
        """Nothing to take."""

    def attend(self, operands: Operands) -> torch.Tensor:
        """[T, heads, v_dim]: attention of the packed queries over their paths."""
        query, value = operands.query, operands.value
        groups = self.groups
        if self.kin is None and len(groups) == 1:
            one = groups[0].attend_one(operands)
            return groups[0].attend(operands) if one is None else one
        out = query.new_empty((query.shape[1], query.shape[0], value.shape[-1]))
        if self.kin is not None:
            if self.kin.mergeable(operands):
                self.kin.attend(out, operands)
            else:
                groups = [*groups, *self.kin.whole]
        for group in groups:
            out[group.start : group.stop] = group.attend(operands)
        return out


class Siblings:
    """Units of families: those that share a prefix with another unit of the forward.

    Args:
        units: at least two of each stem.
        start: packed position of their first new token.

    Attributes:
        order: the order in which the packed tokens take them.
        whole: them in groups, prefix and all, for scores that cannot be merged.
    """

    def __init__(self, units: Sequence[QueryRun], start: int) -> None:
        self._own, self.order = group_units([QueryRun(unit.path[unit.shared :], unit.new) for unit in units], start)
        self.start, self.stop = start, self._own[-1].stop
        self.longest = max(len(unit.path) for unit in units)
        taken, self.whole = 0, []
        for group in self._own:
            members = self.order[taken : taken + len(group.units)]
            self.whole.append(Group([units[i] for i in members], group.start))
            taken += len(members)
        families: dict[int, list[int]] = {}
        prefixes: dict[int, np.ndarray] = {}
        at = start
        for i in self.order:
            families.setdefault(units[i].stem, []).extend(range(at, at + units[i].new))
            prefixes[units[i].stem] = units[i].path[: units[i].shared]
            at += units[i].new
        stems = list(families)
        self._prefixes = [
            Prefixes([prefixes[stems[i]] for i in batch], [families[stems[i]] for i in batch])
            for batch in buckets([(len(families[stem]), len(prefixes[stem])) for stem in stems])
        ]

    def mergeable(self, operands: Operands) -> bool:
        """Return True if these scores split into two softmaxes: only CPU flash attention returns log-sum-exps."""
        query, modifiers = operands.query, operands.modifiers
        return (
            query.device.type == "cpu"
            and modifiers.softcap is None
            and modifiers.sinks is None
            and (modifiers.window is None or modifiers.window >= self.longest)
            and query.shape[-1] == operands.values.shape[-1]
        )

    def attend(self, out: torch.Tensor, operands: Operands) -> None:
        """Write [T, heads, v_dim] of these units' tokens into `out`."""
        query, keys, values = operands.query, operands.keys, operands.values
        weight = query.new_empty((self.stop, query.shape[0]), dtype=torch.promote_types(query.dtype, torch.float32))
        for group in self._own:
            span = slice(group.start, group.stop)
            out[span] = group.attend(operands, weight[span])
        for prefix in self._prefixes:
            rows, real = prefix.rows, prefix.real
            q = query[:, rows].transpose(0, 1)
            k = keys.index_select(0, prefix.slots.view(-1)).view(*prefix.slots.shape, *keys.shape[1:]).transpose(1, 2)
            v = values.index_select(0, prefix.slots.view(-1)).view(*k.shape[:1], -1, *values.shape[1:]).transpose(1, 2)
            shared, mass = flash(q, k, v, prefix.bias(q.dtype), operands.modifiers.scale)
            rows = rows[real]
            shared, mass = shared.transpose(1, 2)[real], mass.transpose(1, 2)[real]  # [tokens, heads, ...]
            part = torch.sigmoid(mass - weight[rows])[..., None].to(out.dtype)
            out[rows] = torch.lerp(out[rows], shared, part)


class Prefixes:
    """The shared prefixes of F families, as one padded batch.

    Attributes:
        slots: [F, P] int64, padded with each prefix's first.
        rows: [F, Q] packed positions of the families' new tokens, padded with each one's first.
        real: [F, Q] bool: which are not padding.
    """

    def __init__(self, prefixes: Sequence[np.ndarray], tokens: Sequence[Sequence[int]]) -> None:
        self.slots = _padded(prefixes)
        self.rows = _padded(tokens)
        counts = torch.tensor([len(t) for t in tokens])
        self.real = torch.arange(self.rows.shape[1])[None] < counts[:, None]
        self._lengths = torch.tensor([len(p) for p in prefixes])

    def bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        """[F, 1, 1, P] additive mask of the padding; None where there is none."""
        outside = torch.arange(self.slots.shape[1])[None] >= self._lengths[:, None]
        if not outside.any():
            return None
        return torch.zeros(outside.shape, dtype=dtype).masked_fill_(outside, -math.inf)[:, None, None]


def _padded(lines: Sequence[Sequence[int] | np.ndarray]) -> torch.Tensor:
    table = np.empty((len(lines), max(map(len, lines))), np.int64)
    for row, line in zip(table, lines, strict=True):
        row[: len(line)] = line
        row[len(line) :] = line[0]
    return torch.from_numpy(table)
