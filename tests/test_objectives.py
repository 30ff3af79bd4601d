"""Training objectives: hand-worked numbers, gradients, symmetries, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from prm_search.training.objectives import balance, ce, dpo, ipvrm, kto, nca

LN2, LN3 = math.log(2), math.log(3)


def fp64(*values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# sigmoid(log 3) = 3/4 and sigmoid(-log 3) = 1/4, so every number below is a logarithm of small fractions.


def test_ce_by_hand():
    loss = ce(fp64(0.0, LN3, LN3, -LN3, LN3), fp64(1, 1, 0, 0, 0.5))
    assert loss.tolist() == pytest.approx(
        [LN2, math.log(4 / 3), math.log(4), math.log(4 / 3), 0.5 * (math.log(4 / 3) + math.log(4))], abs=1e-14
    )


def test_dpo_by_hand():
    assert dpo(fp64(LN3, 0.0, 1.0), fp64(0.0, LN3, 1.0)).tolist() == pytest.approx(
        [math.log(4 / 3), math.log(4), LN2], abs=1e-14
    )


def test_nca_by_hand():
    # -log(3/4) - (log(1/4) + log(3/4)) / 2, then both rewards at 0: log 2 + log 2
    assert nca(fp64(LN3, 0.0), fp64(-LN3, 0.0)).tolist() == pytest.approx(
        [math.log(4 / 3) + 0.5 * (math.log(4) + math.log(4 / 3)), 2 * LN2], abs=1e-14
    )


def test_nca_is_least_where_the_docstring_says():
    chosen = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    loss = nca(chosen, torch.full_like(chosen, -60.0))
    best = chosen[loss.argmin()]
    assert torch.sigmoid(best).item() == pytest.approx(2 / 3, abs=1e-3)
    assert loss.min().item() == pytest.approx(math.log(3 / 2) + LN3 / 2, abs=1e-6)


def test_kto_by_hand():
    loss = kto(fp64(LN3, LN3, 1.0, 1.0), torch.tensor([True, False, True, False]), fp64(0.0, 0.0, 1.0, 1.0))
    assert loss.tolist() == pytest.approx([1 / 4, 3 / 4, 1 / 2, 1 / 2], abs=1e-14)
    assert kto(fp64(LN3 + 2), fp64(1), torch.tensor(2.0, dtype=torch.float64)).tolist() == pytest.approx([1 / 4])


def test_no_gradient_reaches_the_baseline_of_kto():
    baseline = torch.tensor(0.3, requires_grad=True)
    reward = torch.tensor([0.5], requires_grad=True)
    kto(reward, torch.tensor([True]), baseline).sum().backward()
    assert baseline.grad is None
    assert reward.grad.item() == pytest.approx(-torch.sigmoid(torch.tensor(0.2)).item() * 0.450166, abs=1e-6)


def test_ipvrm_by_hand():
    # values log 3, 0, (log 3) / 3: of the first row; padding, wherever it is, counts nowhere
    rewards = fp64([9.0, LN3, -LN3, 9.0, LN3], [LN3, 9.0, 9.0, 9.0, 9.0])
    mask = torch.tensor([[False, True, True, False, True], [True, False, False, False, False]])
    first = (math.log(4 / 3) + LN2 + math.log1p(3 ** (-1 / 3))) / 3
    assert ipvrm(rewards, mask, torch.tensor([True, False])).tolist() == pytest.approx([first, math.log(4)], abs=1e-14)


def test_margin_of_ipvrm_asks_both_labels_for_more():
    mask = torch.ones(2, 1, dtype=torch.bool)
    loss = ipvrm(fp64([2 * LN3], [-2 * LN3]), mask, torch.tensor([True, False]), margin=LN3)
    assert loss.tolist() == pytest.approx([math.log(4 / 3)] * 2, abs=1e-14)


def test_padding_may_be_anything():
    rewards = fp64([1.0, math.nan, math.inf])[None].reshape(1, 3).requires_grad_()
    loss = ipvrm(rewards, torch.tensor([[True, False, False]]), torch.tensor([True]))
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1)))
    assert rewards.grad.tolist() == [[pytest.approx(-1 / (1 + math.e)), 0.0, 0.0]]


def test_gradients():
    torch.manual_seed(0)
    a, b = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    tokens = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    label = torch.tensor([True, False, True, True, False, False])
    mask = torch.rand(6, 5) < 0.6
    mask[:, 2] = True
    for function, given in [
        (lambda x: ce(x, label), (a,)),
        (dpo, (a, b)),
        (nca, (a, b)),
        (lambda x: kto(x, label, torch.tensor(0.2, dtype=torch.float64)), (a,)),
        (lambda x: ipvrm(x, mask, label, margin=0.1), (tokens,)),
    ]:
        assert gradcheck(function, given)


def test_extreme_rewards_stay_finite():
    reward = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
    label = torch.tensor([True, True, False, False])
    for loss in (ce(reward, label), dpo(reward, -reward), nca(reward, -reward), kto(reward, label, torch.tensor(0.0))):
        assert loss.isfinite().all()
        (gradient,) = torch.autograd.grad(loss.sum(), reward)
        assert gradient.isfinite().all()


def test_half_precision_is_computed_in_fp32():
    reward = torch.tensor([0.1, 3.0], dtype=torch.bfloat16)
    label = torch.tensor([True, False])
    assert ce(reward, label).dtype == torch.float32
    assert ce(reward, label).tolist() == ce(reward.float(), label).tolist()


def test_dataset_balance_by_hand():
    label = torch.tensor([True, False, False, False])
    assert balance(label).tolist() == pytest.approx([2, 2 / 3, 2 / 3, 2 / 3])


def test_instance_balance_by_hand():
    # prompt 7: one of three right, 3/2, 3/4, 3/4; prompt 2: one of two, 1, 1; prompt 5 has one label. Sum 5 of 6 items.
    label = torch.tensor([True, False, False, True, False, True])
    group = torch.tensor([7, 7, 7, 2, 2, 5])
    expected = [1.2 * w for w in (1.5, 0.75, 0.75, 1.0, 1.0, 0.0)]
    assert balance(label, group).tolist() == pytest.approx(expected)


def test_balanced_weights_have_mean_one_and_equal_halves():
    torch.manual_seed(1)
    label = torch.rand(200) < 0.2
    for group in (None, torch.randint(20, (200,))):
        weight = balance(label, group)
        assert weight.mean().item() == pytest.approx(1)
        assert weight[label].sum().item() == pytest.approx(weight[~label].sum().item(), rel=1e-5)


BAD = {
    "reward is a list": (lambda: ce([0.0], torch.tensor([1])), TypeError, "reward"),
    "reward is int": (lambda: ce(torch.tensor([1]), torch.tensor([1])), ValueError, "reward"),
    "label of another shape": (lambda: ce(torch.zeros(2), torch.zeros(3)), ValueError, "label"),
    "label 2": (lambda: ce(torch.zeros(1), torch.tensor([2])), ValueError, "label"),
    "label is a list": (lambda: kto(torch.zeros(1), [1], torch.zeros(())), TypeError, "label"),
    "pair of two shapes": (lambda: dpo(torch.zeros(2), torch.zeros(3)), ValueError, "chosen"),
    "nca of two shapes": (lambda: nca(torch.zeros(2), torch.zeros(2, 1)), ValueError, "rejected"),
    "baseline of another shape": (lambda: kto(torch.zeros(2), torch.ones(2), torch.zeros(3)), ValueError, "baseline"),
    "flat token rewards": (lambda: ipvrm(torch.zeros(2), torch.ones(2).bool(), torch.ones(2)), ValueError, "token"),
    "mask of floats": (lambda: ipvrm(torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1)), ValueError, "mask"),
    "empty row": (lambda: ipvrm(torch.zeros(1, 2), torch.zeros(1, 2).bool(), torch.ones(1)), ValueError, "mask"),
    "margin below 0": (
        lambda: ipvrm(torch.zeros(1, 2), torch.ones(1, 2).bool(), torch.ones(1), margin=-1),
        ValueError,
        "margin",
    ),
    "one label": (lambda: balance(torch.tensor([True, True])), ValueError, "both"),
    "one label a group": (lambda: balance(torch.tensor([True, False]), torch.tensor([0, 1])), ValueError, "both"),
    "no items": (lambda: balance(torch.zeros(0, dtype=torch.bool)), ValueError, "both"),
    "float labels": (lambda: balance(torch.ones(2)), ValueError, "label"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    call, kind, word = BAD[case]
    with pytest.raises(kind, match=word):
        call()
