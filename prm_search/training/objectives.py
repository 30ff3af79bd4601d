"""Objectives that make a log-ratio a reward. Pure functions on tensors; each returns one loss an item.

Rewards are `r(y) = beta * sum_t [log pi_phi(y_t) - log pi_ref(y_t)]`, beta included, and token rewards its summands
(arXiv 2412.01981, Proposition 3.1: any of these objectives makes the log-ratio a process reward as well). `label` is 1
or True for a right response; a number between 0 and 1 is the probability of that. Computation is in fp32, or in fp64
for fp64 rewards.

All raise TypeError where an argument is not a tensor, ValueError where shapes differ or a label is out of range.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from ..checks import number

__all__ = ["balance", "ce", "dpo", "ipvrm", "kto", "nca"]


def ce(reward: Tensor, label: Tensor) -> Tensor:
    """Cross entropy of sigmoid(r) against the outcome: -y log sigmoid(r) - (1 - y) log sigmoid(-r).

    arXiv 2412.01981, its cross-entropy form. For the balanced forms multiply by `balance`.

    Args:
        reward: [B].
        label: [B].

    Returns:
        [B], nats.
    """
    r = _floating("reward", reward)
    y = _labels(label, r)
    return softplus(r) - y * r


def dpo(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected) (arXiv 2305.18290).

    Args:
        chosen, rejected: [B] rewards of two responses to one prompt, the first the better one.

    Returns:
        [B], nats.
    """
    r_chosen, r_rejected = _pair(chosen, rejected)
    return -logsigmoid(r_chosen - r_rejected)


def nca(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Noise contrastive alignment of a pair: -log sigmoid(r_c) - (log sigmoid(-r_c) + log sigmoid(-r_r)) / 2.

    NCA of arXiv 2402.05369 for two responses, one preferred. It bounds each reward by itself, where DPO sees only their
    difference.

    Args:
        chosen, rejected: [B] rewards of two responses to one prompt, the first the better one.

    Returns:
        [B], nats; least, log(3/2) + log(3) / 2, where sigmoid(r_c) = 2/3 and r_r is far below 0.
    """
    r_chosen, r_rejected = _pair(chosen, rejected)
    return -logsigmoid(r_chosen) - 0.5 * (logsigmoid(-r_chosen) + logsigmoid(-r_rejected))


def kto(reward: Tensor, label: Tensor, baseline: Tensor) -> Tensor:
    """1 - sigmoid(r - z) for a right response, 1 - sigmoid(z - r) for a wrong one.

    arXiv 2402.01306, with both of its weights 1.

    Args:
        reward: [B].
        label: [B].
        baseline: [] or [B], z = beta * KL(pi_phi || pi_ref) >= 0, which no gradient reaches. The paper estimates z by
            the mean reward of responses to other prompts, cut off at 0.

    Returns:
        [B], in (0, 1).

    Raises:
        ValueError: also where baseline is below 0 or NaN.
    """
    r = _floating("reward", reward)
    y = _labels(label, r)
    z = _floating("baseline", baseline).detach()
    if not bool((z >= 0).all()):
        raise ValueError(f"baseline has {float(z.min())}: a KL divergence, a number >= 0, is needed")
    if z.ndim and z.shape != r.shape:
        raise ValueError(f"baseline has shape {list(z.shape)}; [] or {list(r.shape)}, the reward's, is needed")
    return y * torch.sigmoid(z - r) + (1 - y) * torch.sigmoid(r - z)


def ipvrm(token_rewards: Tensor, mask: Tensor, label: Tensor, *, margin: float = 0.0) -> Tensor:
    """Cross entropy of every prefix's length-normalised value against the outcome, averaged over the prefixes.

        v_t = (1 / t) * sum_{i <= t} r_i
        loss = mean_t [-y log sigmoid(v_t - margin) - (1 - y) log sigmoid(-v_t - margin)]

    arXiv 2604.13197, eq. 9, with the margin of its released code, which trains with beta 10. That code averages over
    all tokens of a batch at once, so that long responses weigh more; here every response weighs the same.

    Args:
        token_rewards: [B, T].
        mask: [B, T] bool, the response's tokens; others are left out wherever they stand.
        label: [B].
        margin: >= 0, how far beyond 0 a value should be.

    Returns:
        [B], nats.

    Raises:
        ValueError: also where a row has no token, or margin is negative or not finite.
    """
    r = _floating("token_rewards", token_rewards, 2)
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    if mask.shape != r.shape or mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype} {list(mask.shape)}; bool {list(r.shape)}, as token_rewards, is needed")
    number("margin", margin, "a finite number >= 0", lambda value: 0 <= value < float("inf"))
    lengths = mask.sum(1)
    if bool((lengths == 0).any()):
        raise ValueError("mask has a row without a token: a response has at least one")
    y = _labels(label, r[:, 0])[:, None]
    prefix = mask.cumsum(1).clamp(min=1)
    value = torch.where(mask, r, 0).cumsum(1) / prefix
    losses = y * softplus(margin - value) + (1 - y) * softplus(margin + value)
    return torch.where(mask, losses, 0).sum(1) / lengths


def balance(label: Tensor, group: Tensor | None = None) -> Tensor:
    """Weights under which right and wrong responses count the same in all, for `ce`; their mean is 1.

    Without groups (dataset-balanced) an item of label y weighs N / (2 N_y). With groups (instance-balanced) that holds
    within each prompt that has both labels, n / (2 n_y). A prompt with one label weighs 0: it does not tell what makes
    a response to it right. arXiv 2412.01981 reports both forms, by leaving data out; weights lose none.

    Args:
        label: [N] bool.
        group: [N] int64, the number of each item's prompt; None for the dataset-balanced form.

    Returns:
        [N] fp32.

    Raises:
        ValueError: there are not both labels, anywhere or in any group.
    """
    if not isinstance(label, Tensor) or (group is not None and not isinstance(group, Tensor)):
        raise TypeError(f"label and group must be tensors, got {type(label).__name__} and {type(group).__name__}")
    if label.ndim != 1 or label.dtype != torch.bool or (group is not None and group.shape != label.shape):
        raise ValueError(f"label is {label.dtype} {list(label.shape)}; bool [N] is needed, and group of the same shape")
    group_index = torch.zeros_like(label, dtype=torch.long) if group is None else group.unique(return_inverse=True)[1]
    groups = int(group_index.max()) + 1 if len(group_index) else 0
    right = torch.zeros(groups, device=label.device).index_add_(0, group_index, label.float())
    total = torch.bincount(group_index, minlength=groups).float()
    mixed = (right > 0) & (right < total)
    if not bool(mixed.any()):
        raise ValueError("label: right and wrong responses are both needed" + ("" if group is None else " in a group"))
    own = torch.where(label, right[group_index], total[group_index] - right[group_index])
    weight = torch.where(mixed[group_index], total[group_index] / (2 * own), 0.0)
    return weight * (len(label) / weight.sum())


def _floating(name: str, tensor: Tensor, ndim: int | None = None) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}; a floating-point tensor is needed")
    if ndim is not None and tensor.ndim != ndim:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; {ndim} dimensions are needed")
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _pair(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    pair = _floating("chosen", chosen), _floating("rejected", rejected)
    if pair[0].shape != pair[1].shape:
        raise ValueError(f"chosen has shape {list(chosen.shape)}, rejected {list(rejected.shape)}; they must agree")
    return pair


def _labels(label: Tensor, reward: Tensor) -> Tensor:
    if not isinstance(label, Tensor):
        raise TypeError(f"label must be a tensor, got {type(label).__name__}")
    if label.shape != reward.shape:
        raise ValueError(f"label has shape {list(label.shape)}; {list(reward.shape)}, one an item, is needed")
    if label.device.type == "cpu" and label.dtype != torch.bool and not bool(((label >= 0) & (label <= 1)).all()):
        raise ValueError(f"label spans [{label.min().item()}, {label.max().item()}]; it must lie in [0, 1]")
    return label.to(reward.dtype)
