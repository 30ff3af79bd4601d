"""The tensors behind the slots: one K and one V pool a layer, allocated once and never moved."""

from __future__ import annotations

import torch

from ..triton_kernels import write_kv


class KVPool:
    """K `[slots, kv_heads, k_dim]` and V `[slots, kv_heads, v_dim]` for each layer.

    Shapes, dtype and device are read off the first keys and values a layer writes, so layers may differ in them
    and K may differ from V (multi-head latent attention).

    Args:
        slots: rows of every pool.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._made_for: tuple[torch.dtype, torch.device] | None = None

    def write(
        self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, every: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the K and V of T tokens and return the layer's pools.

        Args:
            layer: layer index.
            slots: [T] int32 or int64.
            keys: [T, kv_heads, k_dim].
            values: [T, kv_heads, v_dim].
            every: whether no slot is negative, which would be a token that is not stored.
        """
        pools = self.layers.get(layer)
        if pools is None:
            pools = (
                torch.empty((self.slots, *keys.shape[1:]), dtype=keys.dtype, device=keys.device),
                torch.empty((self.slots, *values.shape[1:]), dtype=values.dtype, device=values.device),
            )
            self.layers[layer] = pools
        if every and keys.device.type == "cpu" and slots.dtype == torch.int64:
            pools[0].index_copy_(0, slots, keys)  # a step of few tokens feels the op's checks in every layer
            pools[1].index_copy_(0, slots, values)
        else:
            write_kv(*pools, keys, values, slots)
        return pools

    def follow(self, weight: torch.Tensor) -> None:
        """Drop pools made before the model was moved or cast. For when no slot is in use.

        Args:
            weight: one of the model's, always the same one.
        """
        made_for = weight.dtype, weight.device
        if made_for != self._made_for:
            self.layers.clear()
            self._made_for = made_for

    @property
    def width(self) -> int:
        """Return the numbers of K that a token has in the first layer; 0 before anything is written."""
        return next((keys[0].numel() for keys, _ in self.layers.values()), 0)

    def bytes(self) -> int:
        """Bytes of all pools, used or not."""
        return sum(t.numel() * t.element_size() for pair in self.layers.values() for t in pair)
