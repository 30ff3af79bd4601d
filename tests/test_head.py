"""The head's log-probabilities: no bias that a sum over many tokens would show, at vocabularies of real models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prm_search.engine.head import Head
from prm_search.steering.kl_bound import bounded_alpha
from prm_search.steering.steering import _ratio
from prm_search.triton_kernels import guide_logits, linear_logprob
from prm_search.triton_kernels.reference import log_softmax

UNBIASED = (
    5e-7  # nats, mean signed error: half an ulp of the log-probs here; torch's log_softmax is 20 times as far off
)
ROWS = 8


class Linear(torch.nn.Module):
    """As much of a causal LM as a head looks at."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(16, vocabulary, bias=False)
        self.config = self
        self.vocab_size = vocabulary

    def get_text_config(self) -> Linear:
        return self

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head


@pytest.fixture(params=[49_152, 262_144], scope="module")
def case(request: pytest.FixtureRequest) -> tuple[Head, Tensor, Tensor]:
    """A head, hidden rows, and the float64 log-softmax of its logits."""
    module = Linear(request.param)
    hidden = 8 * torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        head = Head(module)
        return head, hidden, torch.log_softmax(head.logits(hidden).double(), -1)


def bias(ours: Tensor, truth: Tensor) -> float:
    return abs((ours.double() - truth).mean().item())


@torch.no_grad()
def test_what_is_kept_from_sampling_has_no_bias(case: tuple[Head, Tensor, Tensor]) -> None:
    head, hidden, truth = case
    assert bias(head.log_softmax(hidden), truth) < UNBIASED
    assert bias(torch.log_softmax(head.logits(hidden), -1), truth) > 4 * UNBIASED  # the test can see it


@torch.no_grad()
def test_a_score_has_no_bias(case: tuple[Head, Tensor, Tensor]) -> None:
    """Over 2,000 tokens, each drawn from every row."""
    head, hidden, truth = case
    targets = torch.randint(head.vocab, (256, ROWS), generator=torch.Generator().manual_seed(2))
    ours = linear_logprob(hidden.repeat(256, 1), head.linear.weight, targets.flatten()).view(256, ROWS)
    assert bias(ours, truth.gather(1, targets.t()).t()) < UNBIASED


@torch.no_grad()
def test_steering_has_no_bias(case: tuple[Head, Tensor, Tensor]) -> None:
    """The PRM's table is wide, the reference's is certain of one token: nothing cancels."""
    head, hidden, truth = case
    prm, reference = head.logits(hidden), torch.zeros(ROWS, head.vocab)
    reference[:, 0] = 30.0
    exact = truth - torch.log_softmax(reference.double(), -1)
    ratio = _ratio(log_softmax(prm), log_softmax(reference))
    assert bias(ratio, exact) < 4 * UNBIASED  # log-ratios of 30 have a coarser ulp
    steered = guide_logits(torch.zeros_like(prm), prm, reference, 1.0, backend="torch")
    assert bias(steered, exact) < 4 * UNBIASED


def test_halves_are_widened_and_what_is_ruled_out_stays_so() -> None:
    rows = torch.tensor([[0.0, -torch.inf, 1.0]], dtype=torch.bfloat16)
    assert log_softmax(rows).dtype == torch.float32
    assert log_softmax(rows)[0, 1] == -torch.inf
    assert log_softmax(rows.double()).dtype == torch.float64
    assert bounded_alpha(rows.float(), torch.zeros(1, 3), torch.ones(1), torch.ones(1)) == 1.0
