"""The choice of what runs an op (torch or Triton), and the common part of launches. Imports Triton only to launch.

Each public op has a planner of the same signature; `choice(op, *args)` asks it and runs nothing. An op given
`backend="triton"` that Triton cannot run raises ValueError with the planner's reason; only "auto" may turn to torch.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "triton"]
_BACKENDS = ("auto", "torch", "triton")
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Choice:
    """The choice for an op.

    Fields: `backend` is "torch" or "triton"; `reason` says why in a sentence; `detail` names the tile, splits and
    launches of a Triton run (empty for torch).
    """

    backend: Literal["torch", "triton"]
    reason: str
    detail: str = ""


_PLANNERS: dict[Callable[..., Any], Callable[..., Choice]] = {}


def register(op: Callable[..., Any], planner: Callable[..., Choice]) -> None:
    """Make `planner`, a function of the op's own arguments, the answer to `choice(op, ...)`."""
    _PLANNERS[op] = planner


def choice(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Return what `op(*args, **kwargs)` would run, without running it.

    Args:
        op: a public op of this package, the function itself.
        args, kwargs: the op's own arguments.

    Returns:
        A `Choice`.

    Raises:
        ValueError: `op` is not one of the package's ops, or the op itself would refuse these arguments.
    """
    if op not in _PLANNERS:
        names = sorted(f.__name__ for f in _PLANNERS)
        raise ValueError(f"op is {op!r}; choice() knows the ops {names}")
    return _PLANNERS[op](*args, **kwargs)


# ------------------------------------------------------------------------------------------------ the machine


def _installed_triton() -> str | None:
    """Triton's version, without importing it; "" where its package has another name; None where there is none."""
    if importlib.util.find_spec("triton") is None:
        return None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("triton")
    return ""


_TRITON = _installed_triton()
_DEVICES: dict[int, tuple[tuple[int, int], int]] = {}


def interpreting() -> bool:
    """Return True if Triton kernels run in its Python interpreter (TRITON_INTERPRET=1 before their first use)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _missing_triton() -> str | None:
    if _TRITON is None:
        return "triton is not installed (pip install 'prm-search[triton]')"
    if _TRITON and tuple(int(part) for part in _TRITON.split(".")[:2]) < (3, 6):
        return f"triton is {_TRITON}; 3.6 or newer is needed"
    return None


def _device_facts(device: torch.device) -> tuple[tuple[int, int], int]:
    index = _index(device)
    if index not in _DEVICES:
        properties = torch.cuda.get_device_properties(index)
        _DEVICES[index] = (properties.major, properties.minor), properties.multi_processor_count
    return _DEVICES[index]


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; (0, 0) for a CPU tensor in the interpreter."""
    return _device_facts(device)[0] if device.type == "cuda" else (0, 0)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 4 in the interpreter, so that its tests split work too."""
    return _device_facts(device)[1] if device.type == "cuda" else 4


# ------------------------------------------------------------------------------------------------ the decision


def obstacle(*operands: Tensor) -> str | None:
    """Why Triton cannot run on these operands (all of the op's floating operands), or None if it can."""
    first = operands[0]
    if (missing := _missing_triton()) is not None:
        return missing
    for operand in operands:
        if operand.dtype not in _TRITON_DTYPES:
            return f"an operand is {operand.dtype}; float16, bfloat16 and float32 are supported"
        if operand.device != first.device:
            return f"operands are on {first.device} and {operand.device}"
    if interpreting():
        if any(operand.dtype == torch.bfloat16 for operand in operands):
            return "bfloat16 is computed wrongly by Triton's interpreter (TRITON_INTERPRET=1)"
        return None
    if first.device.type != "cuda":
        return f"the operands are on {first.device.type}; Triton kernels need CUDA (or TRITON_INTERPRET=1)"
    if torch.version.hip is not None:
        return "this is a ROCm build of torch; the kernels are written and checked for NVIDIA GPUs"
    if capability(first.device) < (8, 0):
        return f"compute capability {capability(first.device)} is below 8.0"
    return None


def gradient_obstacle(*operands: Tensor) -> str | None:
    """Why an op without a Triton backward cannot run it here: an operand needs a gradient. None if none does."""
    if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
        return "an operand requires grad and this op has no Triton backward"
    return None


def decide(name: str, backend: str, why_not: str | None, operand: Tensor, detail: str = "") -> Choice:
    """Resolve `backend` for one call.

    Args:
        name: the op, for the message.
        backend: what the caller asked for.
        why_not: why Triton is impossible here, or None.
        operand: any operand; CPU tensors go to torch under "auto", even where the interpreter would take them.
        detail: the Triton plan in words.

    Raises:
        ValueError: `backend` is not a known word, or "triton" is impossible.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed are {', '.join(map(repr, _BACKENDS))}")
    if backend == "torch":
        return Choice("torch", "asked for")
    if backend == "triton":
        if why_not is not None:
            raise ValueError(f"{name}: backend='triton' is impossible: {why_not}; use backend='torch' or 'auto'")
        return Choice("triton", "asked for", detail)
    if why_not is not None:
        return Choice("torch", why_not)
    if operand.device.type != "cuda":
        return Choice("torch", "the interpreter is for tests; ask for backend='triton' to use it")
    return Choice("triton", "CUDA operands", detail)


# -------------------------------------------------------------------------------------------------- launching


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **kwargs: Any) -> None:
    """`kernel[grid](*args, **kwargs)` on `device`, wherever the caller's current device is."""
    if device.type == "cuda" and device.index is not None and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **kwargs)
    else:
        kernel[grid](*args, **kwargs)


def launch_with_scratch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **kwargs: Any) -> None:
    """`launch` for kernels that build TMA descriptors on the device, which need a scratch allocator.

    The allocator is set in a copied context: Triton keeps it in a ContextVar, which new threads do not inherit and
    which we do not want to leave changed for the caller's own kernels.
    """

    def run() -> None:
        import triton

        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
        launch(kernel, grid, device, *args, **kwargs)

    contextvars.copy_context().run(run)


# ----------------------------------------------------------------------------------------------------- checks


def check_matrix(name: str, tensor: Tensor, ndim: int) -> None:
    """Raise unless `tensor` is a floating tensor of `ndim` dimensions."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}; a torch.Tensor is needed")
    if tensor.ndim != ndim:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; {ndim} dimensions are needed")
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{name} is {tensor.dtype}; a floating-point dtype is needed")


def check_index(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise unless `tensor` is int32 or int64 of exactly `shape`, on `device`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}; a torch.Tensor is needed")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; {list(shape)} is needed")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} is {tensor.dtype}; int32 or int64 is needed")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; the operands are on {device}")


def finite(name: str, value: float) -> float:
    """The number as a float. Raises TypeError for anything but a number, and ValueError unless it is finite."""
    try:
        kind: type | None = bool if isinstance(value, bool) else None
        if kind is None and math.isfinite(value):
            return float(value)
    except OverflowError as error:
        raise ValueError(f"{name} is an integer beyond all floats; a finite number is needed") from error
    except (TypeError, ValueError):
        kind = type(value)
    if kind is not None:
        raise TypeError(f"{name} is {value!r:.80}; a finite number is needed, not {kind.__name__}")
    raise ValueError(f"{name} is {value!r}; a finite number is needed")


def check_positive(name: str, value: float | None) -> None:
    """Raise unless `value` is None or a finite number above 0: TypeError for anything but a number, else ValueError."""
    if value is not None and finite(name, value) <= 0:
        raise ValueError(f"{name} is {value!r}; None or a finite number above 0 is needed")
