"""Integers that the host plans and the device reads: one copy a forward, that the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def number_to_device(numbers: np.ndarray, device: torch.device) -> torch.Tensor:
    """Numbers of any dtype on a device, through pinned memory where that is a GPU: the host does not wait."""
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Integer arrays on a device.

    On a GPU they travel together, as int32 through pinned memory, in one copy on the current stream; torch's allocator
    keeps the pinned memory until the copy is done. On the CPU they are the arrays themselves, without a copy.

    Args:
        arrays: integers below 2^31.
        device: where they are needed.

    Returns:
        a tensor for each, of its shape; int32 on a GPU.
    """
    if device.type != "cuda":
        return [torch.from_numpy(array).to(device) for array in arrays]
    flat = torch.empty(sum(array.size for array in arrays), dtype=torch.int32, pin_memory=True)
    np.concatenate([array.ravel() for array in arrays], out=flat.numpy(), casting="unsafe")
    parts = flat.to(device, non_blocking=True).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
