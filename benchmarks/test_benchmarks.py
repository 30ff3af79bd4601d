"""pytest-benchmark suites over the same work as report.py: `pytest benchmarks --benchmark-only`."""

from __future__ import annotations

import pytest
import scoring
from common import SHAPES, Machine, model
from decoding import Ours, Theirs

from prm_search import ImplicitPRM
from prm_search.engine.language_model import LanguageModel


@pytest.fixture(scope="module")
def machine() -> Machine:
    return Machine.here()


@pytest.fixture(scope="module")
def pair(machine):
    return model("small", 1, machine), model("small", 2, machine)


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("method", ["ours", *scoring.RIVALS])
def test_scoring(benchmark, machine, pair, method, steps):
    benchmark.group = f"scoring a pair, 8 beams x 50 tokens x {steps} steps"
    work = scoring.Work.draw(SHAPES["small"]["vocab_size"], 150, 8, 50, steps)
    if method == "ours":
        scorer = ImplicitPRM(*pair)
        benchmark.pedantic(scoring.our_rewards, (scorer, work), rounds=3, warmup_rounds=1)
    else:
        benchmark.pedantic(scoring.rival_rewards, (method, *pair, work, machine.device), rounds=3)


@pytest.mark.parametrize("families", [4, 16])
def test_decoding(benchmark, pair, families):
    benchmark.group = "24 tokens for 16 rows behind 550"
    ours = Ours(LanguageModel.of(pair[0]), 137, 550, 16, families)
    benchmark.pedantic(ours.run, (24,), rounds=5, warmup_rounds=1)


def test_decoding_dynamic_cache(benchmark, machine, pair):
    benchmark.group = "24 tokens for 16 rows behind 550"
    benchmark.pedantic(Theirs(pair[0], 550, 16, machine.device).run, (24,), rounds=5, warmup_rounds=1)
