"""A policy and a pair on tiny real models, and the check that whatever was done with them left no KV behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hf_models
import pytest
from exact import exact
from hf_models import STEPS, llama, near
from transformers import LlamaForCausalLM

import prm_search as ps

TOKENIZER = hf_models.tokenizer()


class Bench:
    """A policy, and a pair on its model and another; in float64, or on a model that is given."""

    def __init__(self, model: LlamaForCausalLM | None = None) -> None:
        self.model = exact(llama(0)) if model is None else model
        self.trained = near(self.model, 1)
        self.policy = ps.HFPolicy(self.model, TOKENIZER)
        self.pair = ps.ImplicitPRM(self.trained, self.model, tokenizer=TOKENIZER, beta=0.1)

    def search(self, prompts: Any = ("2+2=", "hi"), **options: Any) -> list[ps.Result]:
        given = {"strategy": ps.Beam(2, 2), "steps": STEPS, "max_new_tokens": 8, **options}
        return ps.search(prompts, **{"policy": self.policy, "scorer": self.pair, **given})

    @property
    def used(self) -> int:
        """KV slots in use in both models."""
        return self.policy.lm.tree.used + self.pair.prm.tree.used


@pytest.fixture(scope="module")
def _shared() -> Bench:
    return Bench()


@pytest.fixture
def bench(_shared: Bench) -> Iterator[Bench]:
    """One for all tests of a file."""
    yield _shared
    assert _shared.used == 0


@pytest.fixture
def own() -> Iterator[Bench]:
    """One to be broken."""
    made = Bench()
    yield made
    assert made.used == 0


FIXTURES = (_shared, bench, own)
