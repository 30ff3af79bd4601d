"""One packed forward: the host plans which tokens go where, the module runs on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .attention.hook import Packed
from .attention.kernel_layout import KernelLayout
from .attention.layout import QueryRun
from .attention.row_layout import RowLayout
from .attention.torch_layout import TorchLayout
from .graph_step.choice import TokenSteps
from .graph_step.static_step import StaticForward
from .graph_step.tapes import Tapes
from .growth import Growth
from .module_run import ModuleRun
from .to_device import to_device
from .waves import Piece, chains, stem_of


class Runner:
    """Plans the forwards of one LanguageModel.

    Args:
        run: its module, pool and kernels.

    Attributes:
        token_steps: how one token for each of a few branches is run.
        taped: whether pieces of a token each may replay a tape, as the rows of a growth do. Whoever sets it calls
            `token_steps.refresh` where weights may have changed.
    """

    def __init__(self, run: ModuleRun) -> None:
        self.run = run
        self.token_steps = TokenSteps(run)
        self.taped = False

    def plan(self, wave: Sequence[Piece], slots: Sequence[np.ndarray]) -> PackedForward | StaticForward:
        """Return how these pieces are run.

        Args:
            wave: the pieces.
            slots: where the new tokens of each go.
        """
        static = self.token_steps.plan(wave, slots)
        if static is not None:
            return static
        single = self.taped and all(len(part) == 1 for part in slots)
        return PackedForward(self.run, wave, slots, self._tapes() if single else None)

    def plan_rows(self, growth: Growth, tokens: np.ndarray | torch.Tensor, slots: np.ndarray) -> TokenForward | None:
        """Return how rows grow by a token each, in their order; None where that is run like any other pieces.

        Args:
            growth: live.
            tokens, slots: [R] int64; tokens that only the device knows are on it.
        """
        run, device = self.run, self.run.device
        gpu = device.type == "cuda"
        if run.backend == "triton" or (run.backend == "auto" and gpu) or self.token_steps.static(gpu):
            return None
        return TokenForward(run, device, growth, tokens, slots, self._tapes())

    def _tapes(self) -> Tapes | None:
        return self.token_steps.tapes if self.token_steps.mode == "auto" else None


def layout_of(run: ModuleRun, units: Sequence[QueryRun]) -> TorchLayout | KernelLayout:
    """SDPA on the CPU, one Triton launch a layer on a GPU."""
    if run.backend == "torch" or (run.backend == "auto" and not run.on_gpu):
        return TorchLayout(units)
    return KernelLayout(units, run.backend)


class TokenForward:
    """A forward of one token for each row of a growth, planned from its arrays.

    Args:
        run: of the module.
        device: its.
        growth, tokens, slots: as Runner.plan_rows.
        tapes: of the module's forwards; None to do without.
    """

    def __init__(
        self,
        run: ModuleRun,
        device: torch.device,
        growth: Growth,
        tokens: np.ndarray | torch.Tensor,
        slots: np.ndarray,
        tapes: Tapes | None,
    ) -> None:
        self._run, self._device, self._tapes = run, device, tapes
        self._layout = RowLayout(growth, run.pool)
        self._ids = tokens
        self._integers = [growth.length - 1, slots]

    def run(self) -> torch.Tensor:
        """Launch the forward; nothing is waited for. Returns [R, D] last hidden rows."""
        if isinstance(self._ids, torch.Tensor):
            ids, (positions, slots) = self._ids, to_device(self._integers, self._device)
        else:
            ids, positions, slots = to_device([self._ids, *self._integers], self._device)
        forward = Packed(self._run.pool, slots, self._layout, every=True)
        return (self._tapes or self._run).hidden(ids.long(), positions.long(), forward)


class PackedForward:
    """A forward of any pieces, planned.

    Args:
        run: of the module.
        wave, slots: as Runner.plan.
        tapes: of the module's forwards, for pieces of a token each; None to do without.

    Attributes:
        order: the order in which the pieces are packed.
    """

    def __init__(
        self, run: ModuleRun, wave: Sequence[Piece], slots: Sequence[np.ndarray], tapes: Tapes | None = None
    ) -> None:
        runs = chains(wave)
        units = []
        for chain in runs:
            top = wave[chain[0]].branch
            new = sum(len(slots[i]) for i in chain)
            units.append(QueryRun(wave[chain[-1]].branch.path_slots(), new, stem_of(top), top.start))
        self._run = run
        self._layout = layout_of(run, units)
        self._tapes = tapes if isinstance(self._layout, TorchLayout) else None
        self.order = [i for unit in self._layout.order for i in runs[unit]]
        ids = [t for i in self.order for t in wave[i].ids()]
        starts = [wave[i].branch.start + wave[i].begin for i in self.order]
        self._ids = np.array(ids, dtype=np.int64)
        self._positions = np.concatenate(
            [np.arange(s, s + len(slots[i])) for s, i in zip(starts, self.order, strict=True)]
        )
        self._slots = np.concatenate([slots[i] for i in self.order])

    def run(
        self, also: Sequence[np.ndarray], ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Launch the forward; nothing is waited for.

        Args:
            also: further integers that are needed on the device.
            ids: [T] tokens of the pieces as they came, one each, where only the device knows them.

        Returns:
            [T, D] last hidden rows in packed order, and `also` as int64 tensors.
        """
        run, tables = self._run, self._layout.tables()
        if ids is not None:
            also = [*also, np.array(self.order, dtype=np.int64)]
        on = to_device([self._ids, self._positions, self._slots, *also, *tables], run.device)
        rest = on[3 : 3 + len(also)]
        self._layout.place(on[3 + len(also) :])
        known = on[0].long() if ids is None else ids.index_select(0, rest.pop().long())
        packed = Packed(run.pool, on[2], self._layout, every=True)
        hidden = (self._tapes or run).hidden(known, on[1].long(), packed)
        return hidden, [part.long() for part in rest]
