"""The differentiable form of `linear_logprob`: forward by either backend, backward one vocabulary chunk at a time.

A chunk's logits are computed again and turned into their gradient (a Triton kernel, or the oracle), rounded to the
operands' dtype as an eager backward pass would, and fed to two plain matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prm_search.triton_kernels import _linear_launch, reference
from prm_search.triton_kernels.calls import HeadCall

# Elements of the backward pass's one temporary, the logits' gradient for a vocabulary chunk.
_GRADIENT_BUDGET = {"cuda": 1 << 27, "cpu": 1 << 23}


def forward(call: HeadCall, backend: str) -> tuple[Tensor, Tensor]:
    """log p(target) and logsumexp on the chosen backend, without a graph."""
    if backend == "torch":
        return reference.linear_logprob(call)
    if torch.compiler.is_compiling():
        from prm_search.triton_kernels import compiled

        return compiled.linear_logprob(*call)
    return _linear_launch.forward(call)


class LinearLogprob(torch.autograd.Function):
    """`forward` with the chunked backward pass: only logsumexp `[N]` is kept between the two."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        scale: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        call = HeadCall(hidden, weight, targets, bias, softcap, scale)
        logprob, logsumexp = forward(call, backend)
        ctx.save_for_backward(hidden, weight, targets, bias, logsumexp)
        ctx.options = softcap, scale, backend
        return logprob, logsumexp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor, grad_logsumexp: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, bias, logsumexp = ctx.saved_tensors
        softcap, scale, backend = ctx.options
        call = HeadCall(hidden, weight, targets, bias, softcap, scale)
        upstream = logsumexp, grad_logprob.contiguous(), grad_logsumexp.contiguous()
        of_hidden, of_weight, _, of_bias = ctx.needs_input_grad[:4]
        grads = _backward(
            call, (of_hidden, of_weight, of_bias), lambda part, first: _gradient(part, *upstream, first, backend)
        )
        return grads[0], grads[1], None, grads[2], None, None, None


def _gradient(
    part: HeadCall, logsumexp: Tensor, grad_logprob: Tensor, grad_logsumexp: Tensor, first: int, backend: str
) -> Tensor:
    """Gradient `[N, Vc]` of the products of a vocabulary chunk from `first` on, in the operands' dtype."""
    upstream = logsumexp, grad_logprob, grad_logsumexp, first
    if backend == "torch":
        return reference.logit_gradient(part, *upstream).to(part.hidden.dtype)
    if torch.compiler.is_compiling():
        from prm_search.triton_kernels import compiled

        return compiled.logit_gradient(*part, *upstream)
    return _linear_launch.logit_gradient(part, *upstream)


def _backward(
    call: HeadCall, wanted: tuple[bool, bool, bool], gradient: Callable[[HeadCall, int], Tensor]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, from the logits' gradient of one vocabulary chunk at a time."""
    hidden, weight, bias = call.hidden, call.weight, call.bias
    dtype = reference.accumulate_dtype(hidden.dtype)
    grad_hidden = torch.zeros_like(hidden, dtype=dtype) if wanted[0] else None
    grad_weight = torch.empty_like(weight) if wanted[1] else None
    grad_bias = torch.empty_like(bias) if bias is not None and wanted[2] else None
    budget = _GRADIENT_BUDGET["cpu" if hidden.device.type == "cpu" else "cuda"]
    width = max(budget // max(call.rows, 1) // 128 * 128, 128)
    for start in range(0, weight.shape[0], width):
        columns = slice(start, min(start + width, weight.shape[0]))
        part = call.columns(columns.start, columns.stop)
        grad = gradient(part, start)  # [N, Vc]
        if grad_hidden is not None:
            grad_hidden += reference.matmul(grad, part.weight)
        if grad_weight is not None:  # no sum follows: the product's fp32 accumulator is rounded once, into its place
            torch.mm(grad.t(), hidden, out=grad_weight[columns])
        if grad_bias is not None:
            grad_bias[columns] = grad.sum(dim=0, dtype=dtype)
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias
