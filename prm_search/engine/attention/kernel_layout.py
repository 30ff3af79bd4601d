"""The Triton path of packed attention: one launch a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from ...triton_kernels import SharedPrefix, tree_attention
from ..to_device import to_device
from .layout import Operands, QueryRun


class KernelLayout:
    """Units as the rows of one `tree_attention` launch; siblings stand together, so that their prefix is read once.

    Attributes:
        order: as in TorchLayout.
    """

    def __init__(self, units: Sequence[QueryRun], backend: Literal["auto", "triton"]) -> None:
        self.backend = backend
        self.order = sorted(range(len(units)), key=lambda i: (units[i].stem, i))
        rows = [units[i] for i in self.order]
        self.new = np.array([unit.new for unit in rows])
        self.full = np.array([len(unit.path) for unit in rows])
        self._rows = rows
        self._on: dict[torch.device, list[torch.Tensor]] = {}
        self._group_tokens = self._prefix = 0

    def tables(self) -> list[np.ndarray]:
        """Slot table, path lengths, query starts, shared prefixes and first rows of families, all int32."""
        count, width = len(self._rows), int(self.full.max())
        stems = np.array([unit.stem for unit in self._rows])
        edges = np.flatnonzero(np.concatenate(([True], stems[1:] != stems[:-1], [True])))
        sizes = np.diff(edges)
        shared = np.where(np.repeat(sizes, sizes) > 1, [unit.shared for unit in self._rows], 0)
        self._group_tokens = int(np.add.reduceat(self.new, edges[:-1]).max())
        self._prefix = int(shared.max())
        table = np.zeros((count, width), np.int32)
        for line, unit in zip(table, self._rows, strict=True):
            line[: len(unit.path)] = unit.path
        starts = np.concatenate(([0], np.cumsum(self.new)))
        return [table, *(part.astype(np.int32) for part in (self.full, starts, shared, edges))]

    def place(self, tables: list[torch.Tensor]) -> None:
        """Take `tables` as they are on a device."""
        self._on[tables[0].device] = tables

    def attend(self, operands: Operands) -> torch.Tensor:
        """As TorchLayout.attend."""
        query, modifiers = operands.query, operands.modifiers
        if query.device not in self._on:  # a model spread over several devices
            self.place(to_device(self.tables(), query.device))
        table, paths, starts, shared, edges = self._on[query.device]
        return tree_attention(
            query.transpose(0, 1),
            operands.keys,
            operands.values,
            slot_table=table,
            path_lens=paths,
            q_starts=starts,
            scale=modifiers.scale,
            softcap=modifiers.softcap,
            window=modifiers.window,
            sinks=modifiers.sinks,
            max_new=int(self.new.max()),
            max_path=int(self.full.max()),
            prefix=SharedPrefix(edges, shared, self._group_tokens, self._prefix),
            backend=self.backend,
        )
