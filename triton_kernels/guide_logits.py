"""`guide_logits`: steer the policy's next-token logits by a pair's log-ratio, before sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from prm_search.triton_kernels import _rows_launch, launch, reference
from prm_search.triton_kernels.launch import Backend, Choice


def guide_logits(
    policy_logits: Tensor,
    prm: Tensor,
    reference_logits: Tensor,
    alpha: Tensor | float,
    *,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """`policy_logits + alpha * (log_softmax(prm) - log_softmax(reference))`, in fp32, rounded once.

    The token-level form of implicit-reward guidance: alpha is 1 / beta_decode of the KL-regularised optimum when the
    reward is the log-ratio. Each log-softmax is over its operand's own width, padding included, as a forward pass of
    that model defines it.

    What is left exactly as it was: rows with alpha 0, -inf entries of the policy (whole rows of them too), columns past
    the narrowest of the three widths, and tokens that the PRM or the reference masks (-inf has no log-ratio).

    On a GPU two launches: the logsumexp of PRM and reference rows, then the sum. The second reads their logits again,
    from L2 while those fit there.

    Args:
        policy_logits: `[B, V]`, floating.
        prm: `[B, Vp]`, floating; Vp may differ from V (padded vocabularies).
        reference_logits: `[B, Vr]`, floating.
        alpha: `[B]` floating, one a row, or a number for all.
        out: where to write, shape and dtype of `policy_logits`; may be `policy_logits` itself.
        backend: "auto" takes Triton on CUDA operands that it supports, else torch; `choice(guide_logits, ...)` tells.

    Returns:
        `[B, V]` in the dtype of `policy_logits`; `out` where given.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or backend="triton" is impossible (also where a gradient
            is needed: Triton's path has no backward).
        TypeError: an operand is not a tensor.
    """
    plan = _plan(policy_logits, prm, reference_logits, alpha, out=out, backend=backend)
    rows = policy_logits.shape[0]
    if not isinstance(alpha, Tensor):
        alpha = torch.full((rows,), launch.finite("alpha", alpha), dtype=torch.float32, device=policy_logits.device)
    if plan.backend == "triton" and not torch.compiler.is_compiling():
        return _rows_launch.guide_logits(policy_logits, prm, reference_logits, alpha, out)
    run = reference.guide_logits
    if plan.backend == "triton":
        from prm_search.triton_kernels import compiled

        run = compiled.guide_logits
    steered = run(policy_logits, prm, reference_logits, alpha)
    return steered if out is None else out.copy_(steered)


def _plan(
    policy_logits: Tensor,
    prm: Tensor,
    reference_logits: Tensor,
    alpha: Tensor | float,
    *,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Choice:
    operands = {"policy_logits": policy_logits, "prm": prm, "reference_logits": reference_logits}
    rows, device = None, None
    for name, operand in operands.items():
        launch.check_matrix(name, operand, 2)
        rows, device = rows if rows is not None else operand.shape[0], device or operand.device
        if operand.shape[0] != rows or operand.device != device:
            raise ValueError(
                f"{name} is {list(operand.shape)} on {operand.device}; {rows} rows on {device} are needed, "
                "as policy_logits has"
            )
    if isinstance(alpha, Tensor):
        launch.check_matrix("alpha", alpha, 1)
        if alpha.shape[0] != rows or alpha.device != device:
            raise ValueError(f"alpha is {list(alpha.shape)} on {alpha.device}; [{rows}] on {device} is needed")
    if out is not None:
        launch.check_matrix("out", out, 2)
        if (out.shape, out.dtype, out.device) != (policy_logits.shape, policy_logits.dtype, policy_logits.device):
            raise ValueError(
                f"out is {list(out.shape)} {out.dtype} on {out.device}; it must be as policy_logits: "
                f"{list(policy_logits.shape)} {policy_logits.dtype} on {policy_logits.device}"
            )
    why_not = None
    if backend != "torch":
        tensors = [*operands.values(), *([alpha] if isinstance(alpha, Tensor) else [])]
        why_not = launch.obstacle(*tensors) or launch.gradient_obstacle(*tensors)
        for name, operand in [*operands.items(), *([("out", out)] if out is not None else [])]:
            if why_not is None and operand.shape[1] > 1 and operand.stride(1) != 1:
                why_not = f"{name} has strides {operand.stride()}; its last dimension must be contiguous"
    return launch.decide("guide_logits", backend, why_not, policy_logits)


launch.register(guide_logits, _plan)
