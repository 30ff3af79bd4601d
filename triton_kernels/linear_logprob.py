"""`linear_logprob` and `linear_log_ratio`: log p(target) straight from hidden rows, `[N, V]` never in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from prm_search.triton_kernels import _linear_launch, launch
from prm_search.triton_kernels._linear_autograd import LinearLogprob, forward
from prm_search.triton_kernels._linear_launch import Head
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
    plan = _plan(hidden, weight, targets, bias, softcap, scale, backend=backend)
    operands = (hidden, weight) if bias is None else (hidden, weight, bias)
    run: Callable[..., Any] = forward
    if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
        run = LinearLogprob.apply
    logprob, logsumexp = run(hidden, weight, bias, targets, softcap, float(scale), plan.backend)
    return (logprob, logsumexp) if return_logsumexp else logprob


def linear_log_ratio(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    targets: Tensor,
    *,
    beta: float = 1.0,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    scale: float = 1.0,
    ref_scale: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """Token rewards of an implicit PRM: `beta * (log p_prm(target) - log p_reference(target))`.

    Few rows are bound by reading the two heads: then one launch covers both, so that neither half leaves the device
    idle at its end. From `tiles.PAIR_ROWS` rows on each head fills the device, and two launches share the merge.

    Args:
        hidden, weight, bias, softcap, scale: the PRM's, as in `linear_logprob`.
        ref_hidden, ref_weight, ref_bias, ref_softcap, ref_scale: the reference's; its width and vocabulary may differ.
        targets: `[N]` int32 or int64, below both vocabularies.
        beta: the reward's scale.
        backend: as in `linear_logprob`.

    Returns:
        Token rewards `[N]`, fp32, beta*nats. Differentiable in every operand that requires grad.

    Raises:
        ValueError: as `linear_logprob`, or the two sides differ in rows.
        TypeError: an operand is not a tensor.
    """
    plan = _plan_ratio(
        hidden, weight, ref_hidden, ref_weight, targets, beta=beta, bias=bias, ref_bias=ref_bias, softcap=softcap,
        ref_softcap=ref_softcap, scale=scale, ref_scale=ref_scale, backend=backend,
    )  # fmt: skip
    operands = [t for t in (hidden, weight, bias, ref_hidden, ref_weight, ref_bias) if t is not None]
    if plan.backend == "torch" or (torch.is_grad_enabled() and any(t.requires_grad for t in operands)):
        ours = linear_logprob(hidden, weight, targets, bias, softcap, scale, backend=plan.backend)
        theirs = linear_logprob(ref_hidden, ref_weight, targets, ref_bias, ref_softcap, ref_scale, backend=plan.backend)
        return beta * (ours - theirs)
    prm = (hidden, weight, bias, softcap, float(scale))
    ref = (ref_hidden, ref_weight, ref_bias, ref_softcap, float(ref_scale))
    if torch.compiler.is_compiling():
        from prm_search.triton_kernels import compiled

        return compiled.linear_log_ratio(*prm, *ref, targets, float(beta))
    return _linear_launch.forward_pair(Head(*prm), Head(*ref), targets, float(beta))


# ------------------------------------------------------------------------------------------ checks and the choice


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, prefix: str = ""
) -> None:
    launch.check_matrix(f"{prefix}hidden", hidden, 2)
    launch.check_matrix(f"{prefix}weight", weight, 2)
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{prefix}hidden is {list(hidden.shape)} and {prefix}weight {list(weight.shape)}; "
            "[N, D] and [V, D] need the same D"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"{prefix}weight is {list(weight.shape)}; V and D must be at least 1")
    if hidden.dtype != weight.dtype or hidden.device != weight.device:
        raise ValueError(
            f"{prefix}hidden is {hidden.dtype} on {hidden.device} and {prefix}weight {weight.dtype} on "
            f"{weight.device}; they must agree"
        )
    launch.check_index("targets", targets, (hidden.shape[0],), hidden.device)
    if bias is not None:
        launch.check_matrix(f"{prefix}bias", bias, 1)
        if bias.shape[0] != weight.shape[0] or bias.device != hidden.device:
            raise ValueError(
                f"{prefix}bias is {list(bias.shape)} on {bias.device}; [{weight.shape[0]}] on {hidden.device} is needed"
            )
    launch.check_positive(f"{prefix}softcap", softcap)
    if targets.device.type == "cpu" and targets.numel() and not torch.compiler.is_compiling():
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(f"targets span [{low}, {high}]; they must lie in [0, {weight.shape[0]})")


def _obstacle(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    why_not = launch.obstacle(hidden, weight, *([] if bias is None else [bias]))
    if why_not is None and weight.stride(1) != 1:
        why_not = f"weight has strides {weight.stride()}; its last dimension must be contiguous"
    return why_not


def _plan(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    *,
    return_logsumexp: bool = False,
    backend: Backend = "auto",
) -> Choice:
    _check(hidden, weight, targets, bias, softcap)
    why_not = None if backend == "torch" else _obstacle(hidden, weight, bias)
    return launch.decide("linear_logprob", backend, why_not, hidden)


def _describe(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    **others: Any,
) -> Choice:
    plan = _plan(hidden, weight, targets, bias, softcap, scale, **others)
    if plan.backend == "torch":
        return plan
    tile, splits = Head(hidden, weight, bias, softcap, scale).schedule()
    return replace(plan, detail=f"{tile}, {splits} vocabulary splits")


def _plan_ratio(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    targets: Tensor,
    *,
    beta: float = 1.0,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    scale: float = 1.0,
    ref_scale: float = 1.0,
    backend: Backend = "auto",
) -> Choice:
    _check(hidden, weight, targets, bias, softcap)
    _check(ref_hidden, ref_weight, targets, ref_bias, ref_softcap, prefix="ref_")
    why_not = None
    if backend != "torch":
        why_not = _obstacle(hidden, weight, bias) or _obstacle(ref_hidden, ref_weight, ref_bias)
    return launch.decide("linear_log_ratio", backend, why_not, hidden)


def _describe_ratio(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    **others: Any,
) -> Choice:
    plan = _plan_ratio(
        hidden, weight, ref_hidden, ref_weight, targets, bias=bias, ref_bias=ref_bias, softcap=softcap,
        ref_softcap=ref_softcap, **others,
    )  # fmt: skip
    if plan.backend == "torch":
        return plan
    prm = Head(hidden, weight, bias, softcap, others.get("scale", 1.0))
    ref = Head(ref_hidden, ref_weight, ref_bias, ref_softcap, others.get("ref_scale", 1.0))
    return replace(
        plan, detail="one launch for both heads" if _linear_launch.joint(prm, ref) else "a launch for each head"
    )


launch.register(linear_logprob, _describe)
launch.register(linear_log_ratio, _describe_ratio)
