"""Numbers that a device computes and the host reads, in one transfer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch


def to_host(columns: Sequence[torch.Tensor]) -> np.ndarray:
    """Columns [R] of one device on the host, in one transfer: [C, R] fp64."""
    if columns[0].device.type == "cpu":
        return np.stack([column.numpy() for column in columns], dtype=np.float64, casting="unsafe")
    return torch.stack([column.double() for column in columns]).cpu().numpy()


def begin_copy(columns: Sequence[torch.Tensor]) -> Callable[[], np.ndarray]:
    """Begin `to_host`, so that what is launched after it is not waited for. Returns what waits for it."""
    if columns[0].device.type != "cuda":
        return lambda: to_host(columns)
    table = torch.stack([column.double() for column in columns])
    host = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
    host.copy_(table, non_blocking=True)
    done = torch.cuda.current_stream(table.device).record_event()

    def wait() -> np.ndarray:
        done.synchronize()
        return host.numpy()

    return wait
