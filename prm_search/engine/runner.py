"""One packed forward: the host plans which tokens go where, the module runs on them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from ..triton_kernels.launch import Backend
from .adapters import device_of
from .attention.hook import Packed, packed
from .attention.kernel_layout import KernelLayout
from .attention.layout import QueryRun
from .attention.torch_layout import TorchLayout
from .graph_step.choice import TokenSteps
from .graph_step.static_step import StaticForward
from .pool import KVPool
from .to_device import to_device
from .waves import Piece, chains, stem_of


class Runner:
    """Runs the forwards of one LanguageModel.

    Args:
        module: a transformers causal LM.
        pool: where its keys and values live.
        backend: of the kernels.

    Attributes:
        steps: how one token for each of a few branches is run.
    """

    def __init__(self, module: Any, pool: KVPool, backend: Backend) -> None:
        self.module = module
        self.pool = pool
        self.backend = backend
        self.configs = _configs_of(module)
        self.steps = TokenSteps(cast(Runner, weakref.proxy(self)))  # no cycle: pools go with the last user

    @property
    def on_gpu(self) -> bool:
        """Whether the module takes its input on a CUDA device."""
        return device_of(self.module).type == "cuda"

    def plan(self, wave: Sequence[Piece], slots: Sequence[np.ndarray]) -> PackedForward | StaticForward:
        """How these pieces are run.

        Args:
            wave: the pieces.
            slots: where the new tokens of each go.
        """
        return self.steps.plan(wave, slots) or PackedForward(self, wave, slots)

    def layout(self, units: Sequence[QueryRun]) -> TorchLayout | KernelLayout:
        """SDPA on the CPU, one Triton launch a layer on a GPU."""
        if self.backend == "torch" or (self.backend == "auto" and not self.on_gpu):
            return TorchLayout(units)
        return KernelLayout(units, self.backend)

    def hidden(self, ids: torch.Tensor, positions: torch.Tensor, forward: Packed) -> torch.Tensor:
        """[T, D] last hidden rows of T packed tokens.

        Args:
            ids, positions: [T] int64 on the module's device.
            forward: what the attention layers shall do.
        """
        with packed(self.configs, forward):
            out = self.module.base_model(
                input_ids=ids[None], position_ids=positions[None], attention_mask=forward.no_mask, use_cache=False
            )
        return out[0][0]


class PackedForward:
    """A forward of any pieces, planned.

    Args:
        runner: runs it.
        wave, slots: as Runner.plan.

    Attributes:
        order: the order in which the pieces are packed.
    """

    def __init__(self, runner: Runner, wave: Sequence[Piece], slots: Sequence[np.ndarray]) -> None:
        runs = chains(wave)
        units = []
        for chain in runs:
            top = wave[chain[0]].branch
            new = sum(len(slots[i]) for i in chain)
            units.append(QueryRun(wave[chain[-1]].branch.path_slots(), new, stem_of(top), top.start))
        self._runner = runner
        self._layout = runner.layout(units)
        self.order = [i for unit in self._layout.order for i in runs[unit]]
        ids = [t for i in self.order for t in wave[i].branch.token_ids[wave[i].begin : wave[i].end]]
        starts = [wave[i].branch.start + wave[i].begin for i in self.order]
        self._ids = np.array(ids, dtype=np.int64)
        self._positions = np.concatenate(
            [np.arange(s, s + len(slots[i])) for s, i in zip(starts, self.order, strict=True)]
        )
        self._slots = np.concatenate([slots[i] for i in self.order])

    def run(self, also: Sequence[np.ndarray]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Launch the forward; nothing is waited for.

        Args:
            also: further integers that are needed on the device.

        Returns:
            [T, D] last hidden rows in packed order, and `also` as int64 tensors.
        """
        runner, device = self._runner, device_of(self._runner.module)
        tables = self._layout.tables()
        on = to_device([self._ids, self._positions, self._slots, *also, *tables], device)
        rest = on[3 : 3 + len(also)]
        self._layout.place(on[3 + len(also) :])
        hidden = runner.hidden(on[0].long(), on[1].long(), Packed(runner.pool, on[2], self._layout))
        return hidden, [part.long() for part in rest]


def _configs_of(module: Any) -> list[Any]:
    configs = {id(m.config): m.config for m in module.modules() if hasattr(m, "config")}
    return [c for c in configs.values() if hasattr(c, "_attn_implementation_internal")]
