"""The demo's modules and what plain forwards of them say, for the tests of vLLM's logits processor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prm_search.demo import pair_dir


@pytest.fixture(scope="module")
def models() -> list[Any]:
    """The policy, the PRM and the reference."""
    names = ("policy", "prm", "policy")
    return [AutoModelForCausalLM.from_pretrained(pair_dir() / name, dtype=torch.float32).eval() for name in names]


@torch.no_grad()
def plain_rows(models: Sequence[Any], ids: Sequence[int]) -> list[torch.Tensor]:
    """Logits of the policy and log-probabilities of the pair after ids, [V] each."""
    rows = [model(torch.tensor([ids]), use_cache=False).logits[0, -1].float() for model in models]
    return [rows[0], *(row.log_softmax(-1) for row in rows[1:])]
