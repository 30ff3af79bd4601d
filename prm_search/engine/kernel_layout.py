"""The Triton path of packed attention: one launch a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from ..triton_kernels import SharedPrefix, tree_attention
from .layout import Scores, Unit


class KernelLayout:
    """Units as the rows of one `tree_attention` launch; siblings stand together, so that their prefix is read once.

    Attributes:
        order: as in TorchLayout.
    """

    def __init__(self, units: Sequence[Unit], backend: Literal["auto", "triton"]) -> None:
        self.backend = backend
        self.order = sorted(range(len(units)), key=lambda i: (units[i].stem, i))
        rows = [units[i] for i in self.order]
        self.new = np.array([unit.new for unit in rows])
        self.full = np.array([len(unit.path) for unit in rows])
        self._rows = rows
        self._on: tuple[torch.Tensor, torch.Tensor, torch.Tensor, SharedPrefix] | None = None

    def _tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, SharedPrefix]:
        """Slot table, path lengths, query starts and shared prefixes on the device, in one copy a forward."""
        if self._on is None:
            count, width = len(self._rows), int(self.full.max())
            stems = np.array([unit.stem for unit in self._rows])
            edges = np.flatnonzero(np.concatenate(([True], stems[1:] != stems[:-1], [True])))
            sizes = np.diff(edges)
            shared = np.where(np.repeat(sizes, sizes) > 1, [unit.shared for unit in self._rows], 0)
            flat = np.zeros(count * width + 3 * count + 1 + len(edges), np.int32)
            table = flat[: count * width].reshape(count, width)
            for line, unit in zip(table, self._rows, strict=True):
                line[: len(unit.path)] = unit.path
            rest = flat[count * width :]
            rest[:count] = self.full
            rest[count + 1 : 2 * count + 1] = np.cumsum(self.new)
            rest[2 * count + 1 : 3 * count + 1] = shared
            rest[3 * count + 1 :] = edges
            host = torch.from_numpy(flat)
            on = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
            parts = on[count * width :].split([count, count + 1, count, len(edges)])
            tokens = np.add.reduceat(self.new, edges[:-1])
            prefix = SharedPrefix(parts[3], parts[2], int(tokens.max()), int(shared.max()))
            self._on = on[: count * width].view(count, width), parts[0], parts[1], prefix
        return self._on

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        how: Scores,
    ) -> torch.Tensor:
        """As TorchLayout.attend."""
        table, paths, starts, prefix = self._tables(query.device)
        return tree_attention(
            query.transpose(0, 1),
            keys,
            values,
            slot_table=table,
            path_lens=paths,
            q_starts=starts,
            scale=how.scale,
            softcap=how.softcap,
            window=how.window,
            sinks=how.sinks,
            max_new=int(self.new.max()),
            max_path=int(self.full.max()),
            prefix=prefix,
            backend=self.backend,
        )
