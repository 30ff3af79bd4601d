"""`linear_logprob`: log p(target) straight from hidden rows, `[N, V]` never in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from prm_search.triton_kernels import _linear_launch, launch
from prm_search.triton_kernels._linear_autograd import LinearLogprob, forward
from prm_search.triton_kernels.calls import HeadCall
from prm_search.triton_kernels.launch import Backend, Choice


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = ...,
    softcap: float | None = ...,
    scale: float = ...,
    *,
    return_logsumexp: Literal[False] = ...,
    backend: Backend = ...,
) -> Tensor: ...
@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = ...,
    softcap: float | None = ...,
    scale: float = ...,
    *,
    return_logsumexp: Literal[True],
    backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    *,
    return_logsumexp: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target under a linear head, differentiable in hidden, weight and bias.

    Equals this, without the `[N, V]` tensor and with fp32 accumulation whatever the operands' dtype:

        z = scale * (hidden @ weight.T + bias)
        z = softcap * tanh(z / softcap)                      # if softcap
        logprob = z[targets] - logsumexp(z)

    Args:
        hidden: `[N, D]` float16, bfloat16 or float32 rows (float64: torch only, computed in float64). N may be 0.
        weight: `[V, D]` of hidden's dtype. V is any width; every row counts in the softmax.
        targets: `[N]` int32 or int64 in [0, V). On a GPU the range is not checked (that would wait for the device):
            a target outside it gives nan.
        bias: `[V]`, added before `scale`.
        softcap: above 0; soft-capping as in Gemma 2.
        scale: multiplies the logits before the cap, as Cohere's logit_scale (Granite: 1 / logits_scaling).
        return_logsumexp: also return logsumexp(z).
        backend: "auto" takes Triton on CUDA operands that it supports, else torch; `choice(linear_logprob, ...)` tells.

    Returns:
        logprob `[N]` in nats, fp32 (float64 for float64 operands); with `return_logsumexp` also `[N]` logsumexp.

    Raises:
        ValueError: a shape, dtype or device does not fit, a CPU target lies outside [0, V), or backend="triton" is
            impossible for these operands.
        TypeError: an operand is not a tensor.
    """
    call = HeadCall(hidden, weight, targets, bias, softcap, launch.finite("scale", scale))
    plan = _plan(call, backend)
    operands = (hidden, weight) if bias is None else (hidden, weight, bias)
    if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
        logprob, logsumexp = LinearLogprob.apply(*call, plan.backend)
    else:
        logprob, logsumexp = forward(call, plan.backend)
    return (logprob, logsumexp) if return_logsumexp else logprob


# ------------------------------------------------------------------------------------------ checks and the choice


def _check(call: HeadCall) -> None:
    hidden, weight, targets, bias, softcap, _ = call
    launch.check_matrix("hidden", hidden, 2)
    launch.check_matrix("weight", weight, 2)
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden is {list(hidden.shape)} and weight {list(weight.shape)}; [N, D] and [V, D] need the same D"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"weight is {list(weight.shape)}; V and D must be at least 1")
    if hidden.dtype != weight.dtype or hidden.device != weight.device:
        raise ValueError(
            f"hidden is {hidden.dtype} on {hidden.device} and weight {weight.dtype} on {weight.device}; they must agree"
        )
    launch.check_index("targets", targets, (hidden.shape[0],), hidden.device)
    if bias is not None:
        launch.check_matrix("bias", bias, 1)
        if bias.shape[0] != weight.shape[0] or bias.device != hidden.device:
            raise ValueError(
                f"bias is {list(bias.shape)} on {bias.device}; [{weight.shape[0]}] on {hidden.device} is needed"
            )
    launch.check_positive("softcap", softcap)
    if targets.device.type == "cpu" and targets.numel() and not torch.compiler.is_compiling():
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(f"targets span [{low}, {high}]; they must lie in [0, {weight.shape[0]})")


def _plan(call: HeadCall, backend: str) -> Choice:
    _check(call)
    why_not = None
    if backend != "torch":
        why_not = launch.obstacle(call.hidden, call.weight, *([] if call.bias is None else [call.bias]))
        if why_not is None and call.weight.stride(1) != 1:
            why_not = f"weight has strides {call.weight.stride()}; its last dimension must be contiguous"
    return launch.decide("linear_logprob", backend, why_not, call.hidden)


def _describe(*operands: Any, backend: Backend = "auto", return_logsumexp: bool = False, **options: Any) -> Choice:
    """`choice(linear_logprob, ...)`: the plan, with the tile in words."""
    call = HeadCall(*operands, **options)
    call = call._replace(scale=launch.finite("scale", call.scale))
    plan = _plan(call, backend)
    if plan.backend == "torch":
        return plan
    tile, splits = _linear_launch.schedule_of(call)
    return replace(plan, detail=f"{tile}, {splits} vocabulary splits")


launch.register(linear_logprob, _describe)
