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
from prm_search.triton_kernels._linear_launch import Head

# Elements of the backward pass's one temporary, the logits' gradient for a vocabulary chunk.
_GRADIENT_BUDGET = {"cuda": 1 << 27, "cpu": 1 << 23}


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """log p(target) and logsumexp on the chosen backend, without a graph."""
    if backend == "torch":
        return reference.linear_logprob(hidden, weight, targets, bias, softcap, scale)
    if torch.compiler.is_compiling():
        from prm_search.triton_kernels import compiled

        return compiled.linear_logprob(hidden, weight, bias, targets, softcap, scale)
    return _linear_launch.forward(Head(hidden, weight, bias, softcap, scale), targets)


class LinearLogprob(torch.autograd.Function):
    """`forward` with the chunked backward pass: only logsumexp `[N]` is kept between the two."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        scale: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        logprob, logsumexp = forward(hidden, weight, bias, targets, softcap, scale, backend)
        ctx.save_for_backward(hidden, weight, bias, targets, logsumexp)
        ctx.options = softcap, scale, backend
        return logprob, logsumexp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor, grad_logsumexp: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, logsumexp = ctx.saved_tensors
        softcap, scale, backend = ctx.options
        grad_logprob, grad_logsumexp = grad_logprob.contiguous(), grad_logsumexp.contiguous()

        def logit_gradient(part: Tensor, part_bias: Tensor | None, first: int) -> Tensor:
            if backend == "triton" and torch.compiler.is_compiling():
                from prm_search.triton_kernels import compiled

                return compiled.logit_gradient(
                    hidden, part, part_bias, targets, softcap, scale, logsumexp, grad_logprob, grad_logsumexp, first
                )
            if backend == "triton":
                head = Head(hidden, part, part_bias, softcap, scale)
                return _linear_launch.logit_gradient(head, targets, logsumexp, grad_logprob, grad_logsumexp, first)
            grad = reference.logit_gradient(
                hidden, part, targets, part_bias, softcap, scale, logsumexp, grad_logprob, grad_logsumexp, first
            )
            return grad.to(hidden.dtype)

        return (*_backward(hidden, weight, bias, ctx.needs_input_grad[:3], logit_gradient), None, None, None, None)


def _backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    wanted: tuple[bool, bool, bool],
    logit_gradient: Callable[[Tensor, Tensor | None, int], Tensor],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, from the logits' gradient of one vocabulary chunk at a time."""
    rows, (vocabulary, _) = hidden.shape[0], weight.shape
    dtype = reference.accumulate_dtype(hidden.dtype)
    grad_hidden = torch.zeros_like(hidden, dtype=dtype) if wanted[0] else None
    grad_weight = torch.empty_like(weight) if wanted[1] else None
    grad_bias = torch.empty_like(bias) if bias is not None and wanted[2] else None
    budget = _GRADIENT_BUDGET["cpu" if hidden.device.type == "cpu" else "cuda"]
    width = max(budget // max(rows, 1) // 128 * 128, 128)
    for start in range(0, vocabulary, width):
        columns = slice(start, min(start + width, vocabulary))
        grad = logit_gradient(weight[columns], None if bias is None else bias[columns], start)  # [N, Vc]
        if grad_hidden is not None:
            grad_hidden += reference.matmul(grad, weight[columns])
        if grad_weight is not None:
            grad_weight[columns] = reference.matmul(grad.t(), hidden)
        if grad_bias is not None:
            grad_bias[columns] = grad.sum(dim=0, dtype=dtype)
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias
