"""`step_rewards`: ragged sums of token rewards, one a step."""

from __future__ import annotations

import torch
from torch import Tensor

from prm_search.triton_kernels import _rows_launch, launch, reference
from prm_search.triton_kernels.launch import Backend, Choice


def step_rewards(token_rewards: Tensor, step_offsets: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Sum the token rewards of each step: q at the step's end minus q at its start.

    Args:
        token_rewards: `[T]` floating, beta*nats, packed.
        step_offsets: `[S + 1]` int32 or int64, non-decreasing, in [0, T]: step s is
            `token_rewards[step_offsets[s]:step_offsets[s + 1]]`, and an empty step sums to 0. On a GPU the values are
            not checked (that would wait for the device).
        backend: "auto" takes Triton on CUDA operands that it supports, else torch; `choice(step_rewards, ...)` tells.

    Returns:
        `[S]` fp32 (float64 for float64 rewards). Differentiable on the torch backend, which "auto" takes for rewards
        that require a gradient.

    Raises:
        ValueError: shapes, dtypes, devices or CPU offsets that do not fit, or backend="triton" is impossible.
        TypeError: an operand is not a tensor.
    """
    plan = _plan(token_rewards, step_offsets, backend=backend)
    if plan.backend == "torch":
        return reference.step_rewards(token_rewards, step_offsets)
    if torch.compiler.is_compiling():
        from prm_search.triton_kernels import compiled

        return compiled.step_rewards(token_rewards, step_offsets)
    return _rows_launch.step_rewards(token_rewards, step_offsets)


def _plan(token_rewards: Tensor, step_offsets: Tensor, *, backend: Backend = "auto") -> Choice:
    launch.check_matrix("token_rewards", token_rewards, 1)
    if isinstance(step_offsets, Tensor) and (step_offsets.ndim != 1 or step_offsets.shape[0] == 0):
        raise ValueError(f"step_offsets has shape {list(step_offsets.shape)}; [S + 1] is needed")
    size = step_offsets.shape[0] if isinstance(step_offsets, Tensor) else 0
    launch.check_index("step_offsets", step_offsets, (size,), token_rewards.device)
    if step_offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        first, last = int(step_offsets[0]), int(step_offsets[-1])
        if first < 0 or last > token_rewards.shape[0] or bool((step_offsets.diff() < 0).any()):
            raise ValueError(
                f"step_offsets must be non-decreasing in [0, {token_rewards.shape[0]}], got {step_offsets.tolist()}"
            )
    why_not = None
    if backend != "torch":
        why_not = launch.obstacle(token_rewards) or launch.gradient_obstacle(token_rewards)
    return launch.decide("step_rewards", backend, why_not, token_rewards)


launch.register(step_rewards, _plan)
