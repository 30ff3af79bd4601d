"""The way into transformers: our attention behind its attention interface, for the time of our own forwards.

One forward takes the new tokens of many branches end to end (`input_ids [1, T]`), without padding and without a
mask. transformers finds the attention function by a name in the model's config; `packed(...)` swaps that name inside
our own call only. A thread that is not in such a call, also one whose model shares the config, gets what the model's
original name stands for.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..pool import KVPool
from .layout import Operands, ScoreModifiers

PREFIX = "prm_search_over_"


class Layout(Protocol):
    """A map of new tokens to the paths that they attend over."""

    def attend(self, operands: Operands) -> torch.Tensor:
        """See TorchLayout.attend."""
        ...


class Packed:
    """One packed forward, as its attention layers see it.

    Args:
        pool: where keys and values live.
        slots: [T] int32 or int64, slot of each packed token; a negative one is written nowhere.
        layout: which tokens attend over which paths.
        every: whether no slot is negative.

    Attributes:
        no_mask: stands for "no mask". transformers hands a mask of four dimensions on as it is; from none at all it
            would look for packed sequences in the position ids, and wait for the device to answer.
    """

    def __init__(self, pool: KVPool, slots: torch.Tensor, layout: Layout, every: bool = False) -> None:
        self.pool = pool
        self._every = every
        self.layout = layout
        self.no_mask = _no_mask(slots.device)
        self._slots = slots

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, modifiers: ScoreModifiers
    ) -> torch.Tensor:
        """Write K and V to their slots, then attend.

        Args:
            layer: layer index.
            query: [1, heads, T, k_dim].
            key, value: [1, kv_heads, T, k_dim or v_dim].
            modifiers: of the scores.

        Returns:
            [1, T, heads, v_dim].
        """
        if self._slots.device != key.device:
            self._slots = self._slots.to(key.device)
        key, value = key[0], value[0]
        keys, values = self.pool.write(layer, self._slots, key.transpose(0, 1), value.transpose(0, 1), self._every)
        return self.layout.attend(Operands(query[0], key, value, keys, values, modifiers, layer))[None]


@functools.cache
def _no_mask(device: torch.device) -> torch.Tensor:
    return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)


# --- the switch ----------------------------------------------------------------------------------------------------

_here = threading.local()  # .packed: the forward this thread is in, if any


def _original(name: str, module: Any) -> Callable[..., Any]:
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get(name, eager)


def _attention(
    module: Any,
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
    modifiers = ScoreModifiers(
        query.shape[-1] ** -0.5 if scale is None else float(scale),
        kwargs.get("softcap"),
        kwargs.get("sliding_window"),
        kwargs.get("s_aux"),
    )
    return packed.attend(module.layer_idx, query, key, value, modifiers), None


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
