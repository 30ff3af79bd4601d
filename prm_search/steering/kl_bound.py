"""A bound on how far steering may move a token's distribution: the largest strength within it, row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from ..triton_kernels.reference import log_softmax

_ROUNDS = 24  # each a pass over [B, V]; peaked rows need up to 20, most 8


def bounded_alpha(policy_logits: Tensor, log_ratio: Tensor, alpha: Tensor, max_kl: Tensor) -> Tensor:
    """The part of alpha with which KL(steered || policy) stays within a bound.

    With p = softmax(policy_logits), r = log_ratio and p_a proportional to p * exp(a * r),

        KL(p_a || p) = a * E_{p_a}[r] - log E_p[exp(a * r)],

    whose derivative in a is a * Var_{p_a}(r): it grows with |a|, so there is one largest |a| <= |alpha| within the
    bound. Regula falsi on sqrt(KL), which is nearly linear in a, finds that a for all rows at once, without waiting for
    the device. The result keeps the bound up to fp32 rounding. Distributions are at temperature 1.

    Args:
        policy_logits: [B, V], -inf for what is ruled out.
        log_ratio: [B, W], W <= V, nats; where it is not finite it counts as 0, as tokens beyond W do.
        alpha: [B] fp32.
        max_kl: [B] fp32, nats, > 0; inf for no bound.

    Returns:
        [B] fp32, of alpha's signs.
    """
    base = log_softmax(policy_logits.float())
    width = log_ratio.shape[1]
    ratio = torch.zeros_like(base)
    ratio[:, :width] = torch.where(log_ratio.isfinite(), log_ratio, 0.0)

    def root_kl(a: Tensor) -> Tensor:
        moved = a[:, None] * ratio
        total = torch.logsumexp(base + moved, dim=-1, keepdim=True)
        gain = moved - total
        return (((base + gain).exp() * gain).sum(dim=-1)).clamp(min=0.0).sqrt()

    target = max_kl.sqrt()
    at_alpha = root_kl(alpha) - target
    inside, outside = torch.zeros_like(alpha), alpha.clone()  # strengths below and above the bound
    f_inside, f_outside = -target, at_alpha
    last = torch.zeros_like(alpha)  # which end moved: -1, 1
    for _ in range(_ROUNDS):
        middle = inside - f_inside * (outside - inside) / (f_outside - f_inside)
        excess = root_kl(middle) - target
        within = excess <= 0
        # The end that stays twice in a row loses half its weight (Illinois), so that both close in.
        f_outside = torch.where(within, torch.where(last < 0, f_outside / 2, f_outside), excess)
        f_inside = torch.where(within, excess, torch.where(last > 0, f_inside / 2, f_inside))
        inside = torch.where(within, middle, inside)
        outside = torch.where(within, outside, middle)
        last = torch.where(within, -1.0, 1.0)
    return torch.where(at_alpha > 0, inside, alpha)
