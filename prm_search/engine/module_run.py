"""One run of a module over packed tokens: what packed forwards and static steps have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..triton_kernels.launch import Backend
from .adapters import device_of
from .attention.hook import Packed, packed
from .pool import KVPool


@contextmanager
def own_modes(kind: str) -> Iterator[None]:
    """Run without gradients, and without what the caller has switched on for its own work.

    What is kept from inference mode could not be written outside it later. Autocast would give keys another dtype than
    the pools have, and log-probabilities that depend on who asks.

    Args:
        kind: type of the device that the model is on.
    """
    if not (torch.is_inference_mode_enabled() or torch.is_grad_enabled() or torch.is_autocast_enabled(kind)):
        yield  # they are switched off already, around several calls
        return
    with torch.inference_mode(False), torch.no_grad():
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                yield
        else:
            yield


class ModuleRun:
    """A module, where its keys and values live, and the kernels that attend over them.

    Args:
        module: a transformers causal LM.
        pool: of its keys and values.
        backend: of the kernels.
    """

    def __init__(self, module: Any, pool: KVPool, backend: Backend) -> None:
        self.module = module
        self.pool = pool
        self.backend = backend
        self._configs = _configs_of(module)

    @property
    def device(self) -> torch.device:
        """Device that the module takes its input ids on."""
        return device_of(self.module)

    @property
    def on_gpu(self) -> bool:
        """Return True if the module takes its input ids on a CUDA device."""
        return self.device.type == "cuda"

    def hidden(self, ids: torch.Tensor, positions: torch.Tensor, forward: Packed) -> torch.Tensor:
        """[T, D] last hidden rows of T packed tokens.

        Args:
            ids, positions: [T] int64 on the module's device.
            forward: what the attention layers shall do.
        """
        with packed(self._configs, forward):
            out = self.module.base_model(
                input_ids=ids[None], position_ids=positions[None], attention_mask=forward.no_mask, use_cache=False
            )
        return out[0][0]


def _configs_of(module: Any) -> list[Any]:
    configs = {id(m.config): m.config for m in module.modules() if hasattr(m, "config")}
    return [c for c in configs.values() if hasattr(c, "_attn_implementation_internal")]
