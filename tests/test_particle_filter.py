"""ParticleFilter against exact enumeration of a toy model: Z-hat without bias, expectations of the target, Gibbs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from fakes import EOS, RULE, FakePolicy, FakeScorer, ToyLM, fraction
from hypothesis import given, strategies as st
from search_cases import SEEDS

from prm_search.driver.result import Result
from prm_search.search import search
from prm_search.strategies import BestOfN, ParticleFilter
from prm_search.strategies.particle_filter import _Spread
from prm_search.strategies.resampling import SCHEMES, effective_size, log_mean_exp, normalised
from prm_search.tree import Node


class Table(ToyLM):
    """A toy model whose probabilities are computed once a context."""

    def probs(self, context: Sequence[int]) -> np.ndarray:
        return _probs(tuple(context[-2:]))


@cache
def _probs(recent: tuple[int, ...]) -> np.ndarray:
    return ToyLM(letters="ab;.", order=2, seed=3).probs(recent)


LM = Table(letters="ab;.", order=2, seed=3)
TOKENS = 4
PROMPT = (5,)


@cache
def reward(prompt: tuple[int, ...], path: tuple[int, ...]) -> float:
    return 2.0 * (fraction("particles", path) - 0.5)


def enumerate_answers() -> dict[tuple[int, ...], tuple[float, float]]:
    """Every answer of at most TOKENS tokens: its probability and its q."""
    answers: dict[tuple[int, ...], tuple[float, float]] = {}

    def grow(path: tuple[int, ...], probability: float, q: float) -> None:
        if path and (path[-1] == EOS or len(path) == TOKENS):
            answers[path] = (probability, q)
            return
        for token, p in zip(LM.vocabulary, LM.probs((*PROMPT, *path)), strict=True):
            grow((*path, token), probability * float(p), q + reward(PROMPT, (*path, token)))

    grow((), 1.0, 0.0)
    return answers


ANSWERS = enumerate_answers()


def filters(runs: int, strategy: object, value: object = "q", **options: object) -> list[Result]:
    """Independent searches: equal prompts draw differently."""
    return search(
        [PROMPT] * runs, policy=FakePolicy(LM), scorer=FakeScorer(reward), strategy=strategy, value=value,
        steps=RULE, max_new_tokens=TOKENS, temperature=1.0, **options,
    )  # fmt: skip


def z_and_expectation(temperature: float) -> tuple[float, float]:
    """Exact Z, and exact Z * P(an answer with an "a" in front)."""
    weights = {path: p * math.exp(q / temperature) for path, (p, q) in ANSWERS.items()}
    return math.fsum(weights.values()), math.fsum(w for path, w in weights.items() if chr(path[0]) == "a")


def with_a(node: Node) -> bool:
    return chr(node.path_ids()[0]) == "a"


def close(samples: Sequence[float], exact: float) -> bool:
    """Whether the mean of independent samples lies within 4 standard errors of the exact value."""
    array = np.asarray(samples, np.float64)
    return abs(array.mean() - exact) < 4 * array.std(ddof=1) / math.sqrt(len(array))


def test_the_enumeration_is_one() -> None:
    assert math.fsum(p for p, _ in ANSWERS.values()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("scheme", "ess", "temperature"),
    [("systematic", 0.6, 0.4), ("multinomial", 1.0, 0.7), ("residual", 1.0, 0.5), ("stratified", 0.6, 0.7)],
)
def test_z_and_expectations_have_no_bias(scheme: str, ess: float, temperature: float) -> None:
    results = filters(200, ParticleFilter(4, temperature=temperature, resample=scheme, ess=ess))
    z, z_times_a = z_and_expectation(temperature)
    estimates = [math.exp(result.log_z) for result in results]
    assert close(estimates, z)
    shares = [sum(node.weight for node in result.candidates if with_a(node)) for result in results]
    assert close([e * share for e, share in zip(estimates, shares, strict=True)], z_times_a)


def test_weights_of_last_steps_miss_the_target() -> None:
    """The check above can fail: its_hub's weights, on the same draws, estimate another distribution."""
    results = filters(
        200, ParticleFilter(4, temperature=0.4, ess=1.0, weights="last", resample="multinomial"),
        value=lambda node: 1 / (1 + math.exp(-node.reward)),
    )  # fmt: skip
    assert all(result.log_z is None for result in results)
    z, z_times_a = z_and_expectation(0.4)
    assert not close([sum(n.weight for n in r.candidates if with_a(n)) for r in results], z_times_a / z)


def test_many_particles_come_to_the_target() -> None:
    (result,) = filters(1, ParticleFilter(600, temperature=0.8))
    z, z_times_a = z_and_expectation(0.8)
    assert result.log_z == pytest.approx(math.log(z), abs=0.1)
    assert sum(n.weight for n in result.candidates if with_a(n)) == pytest.approx(z_times_a / z, abs=0.06)


def test_sweeps_of_gibbs_keep_to_the_target() -> None:
    z, z_times_a = z_and_expectation(1.0)
    results = filters(60, ParticleFilter(3, temperature=1.0, sweeps=12, ess=1.0))
    assert all(math.isclose(sum(n.weight for n in r.candidates), 1.0, abs_tol=1e-9) for r in results)
    assert close([sum(n.weight for n in result.candidates if with_a(n)) for result in results], z_times_a / z)


def test_the_kept_answer_of_a_sweep_survives_it() -> None:
    (result,) = filters(1, ParticleFilter(2, temperature=0.01, sweeps=12, ess=1.0), seed=4)
    best = max(result.candidates, key=lambda node: node.q)
    assert best.weight > 0.4  # so cold a target keeps its best answer once it is found


@given(particles=st.integers(1, 6), seed=SEEDS)
def test_a_filter_that_never_resamples_draws_what_best_of_n_draws(particles: int, seed: int) -> None:
    (filtered,) = filters(1, ParticleFilter(particles, ess=0.0), seed=seed)
    (best,) = filters(1, BestOfN(particles), seed=seed)
    assert {(*n.path_ids(), n.count) for n in filtered.candidates} == {
        (*n.path_ids(), n.count) for n in best.candidates
    }
    weights = normalised([n.q for n in filtered.candidates for _ in range(n.count)])
    shares = [n.weight / n.count for n in filtered.candidates for _ in range(n.count)]
    assert shares == pytest.approx(list(weights))
    assert filtered.log_z == pytest.approx(log_mean_exp([n.q for n in best.candidates for _ in range(n.count)]))


def test_an_automatic_temperature_knows_no_unit_of_the_values() -> None:
    def drawn(unit: float) -> list[tuple[tuple[int, ...], int]]:
        results = filters(20, ParticleFilter(8, temperature="auto"), value=lambda node: unit * node.q)
        assert all(result.log_z is None for result in results)
        assert all(math.isclose(sum(n.weight for n in r.candidates), 1.0) for r in results)
        return [(tuple(node.path_ids()), node.count) for result in results for node in result.candidates]

    assert drawn(1.0) == drawn(1024.0) == drawn(2.0**-10)
    assert drawn(1.0) != [
        (tuple(node.path_ids()), node.count) for result in filters(20, BestOfN(8)) for node in result.candidates
    ]  # it resamples


def test_an_automatic_temperature_is_a_quarter_of_the_pooled_spread() -> None:
    spread = _Spread()
    spread.see(np.array([1.0, 1.0]))
    assert spread.temperature == 1.0  # nothing differs
    spread.see(np.array([0.0, 4.0, math.inf]))
    assert spread.temperature == pytest.approx(0.25 * math.sqrt(8 / 4))


def test_final_weights_weigh_the_vote() -> None:
    results = filters(
        40, ParticleFilter(6, temperature=0.3), select="weighted", answer=lambda text: text[0] if text else None
    )
    for result in results:
        shares: dict[str, float] = {}
        for node in result.candidates:
            if node.path_text() and node.finish == "stop":  # complete answers vote
                shares[node.path_text()[0]] = shares.get(node.path_text()[0], 0.0) + node.weight
        assert result.answer == max(shares, key=shares.__getitem__)
        assert sum(vote.weight for vote in result.selection.votes) <= 1 + 1e-9


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_schemes_are_unbiased_and_keep_the_number(scheme: str) -> None:
    weights = np.array([0.05, 0.0, 0.45, 0.2, 0.3])
    source = np.random.Generator(np.random.PCG64(7))
    counts = np.array([SCHEMES[scheme](weights, 8, source.random) for _ in range(2000)])
    assert (counts.sum(1) == 8).all()
    assert not counts[:, 1].any()
    assert counts.mean(0) == pytest.approx(8 * weights, abs=0.12)
    assert (SCHEMES[scheme](np.array([0.0, 1.0]), 5, source.random) == [0, 5]).all()


def test_weights_of_all_sizes() -> None:
    assert normalised([-math.inf, -math.inf]).tolist() == [0.5, 0.5]
    assert normalised([math.inf, 0.0]).tolist() == [1.0, 0.0]
    assert normalised([-2000.0, -2000.0, -math.inf]).tolist() == [0.5, 0.5, 0.0]
    assert log_mean_exp([-math.inf]) == -math.inf
    assert log_mean_exp([1000.0, 1000.0]) == 1000.0
    assert effective_size(np.array([0.5, 0.5])) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"particles": 0}, "particles=0"), ({"sweeps": 0}, "sweeps=0"), ({"particles": 1, "sweeps": 2}, "particles=1"),
        ({"temperature": 0}, "temperature=0"), ({"temperature": float("nan")}, "temperature=nan"),
        ({"ess": 1.5}, "ess=1.5"), ({"temperature": "cold"}, "temperature='cold'"),
        ({"temperature": "auto", "weights": "last"}, "temperature='auto' needs weights='increments'"),
        ({"resample": "bootstrap"}, "resample='bootstrap'"),
        ({"weights": "all"}, "weights='all'"), ({"value": "best"}, "value='best'"),
    ],
)  # fmt: skip
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParticleFilter(**options)


def test_last_weights_refuse_values_that_are_no_scores() -> None:
    with pytest.raises(ValueError, match=r"weights='last' needs values in \[0, 1\]"):
        filters(1, ParticleFilter(2, weights="last"), value=lambda node: 1.5)
