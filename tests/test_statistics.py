"""The statistics of evaluations, against numbers worked by hand or published, and by their coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from processes import python

from prm_search.evaluation.statistics import (
    auc,
    bootstrap_interval,
    clustered_wilson,
    harmonic_mean,
    paired_bootstrap,
    pass_at_k,
    sign_test,
    wilson,
)

# Newcombe 1998 (Statistics in Medicine 17, 857-872), table I, method 3: the score interval without correction.
NEWCOMBE = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]


@pytest.mark.parametrize(("right", "n", "low", "high"), NEWCOMBE)
def test_wilson_is_newcombes(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_by_hand_and_symmetric():
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    low, high = wilson(3, 17)
    assert wilson(14, 17) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(("right", "n"), [(0, 0), (-1, 5), (6, 5), (1, math.nan)])
def test_wilson_refuses_what_is_no_share(right, n):
    with pytest.raises(ValueError, match="successes="):
        wilson(right, n)


@pytest.mark.parametrize(("right", "n"), [(True, 5), (1, True), (1, 10**400), ("1", 5)])
def test_wilson_refuses_what_is_no_count(right, n):
    with pytest.raises((TypeError, ValueError), match="successes="):
        wilson(right, n)


def test_clusters_of_one_are_plain_wilson():
    assert clustered_wilson([[True]] * 30 + [[False]] * 70) == wilson(30, 100)


def test_answers_that_always_agree_count_once():
    assert clustered_wilson([[True] * 3] * 30 + [[False] * 3] * 70) == pytest.approx(wilson(30, 100))
    assert clustered_wilson([[True] * 3] * 5) == wilson(5, 5)  # no variance to be seen


def test_answers_of_problems_that_are_all_alike_count_each():
    assert clustered_wilson([[True, False]] * 50) == pytest.approx(wilson(50, 100))


def test_the_design_effect_by_hand():
    # Shares 1, 1/2, 1/2, 0 of two answers each: p = 1/2, m = 8. Residuals y_i - p m_i are 1, 0, 0, -1, so the variance
    # is 4/3 * 2 / 64 = 1/24, and n = p (1 - p) / variance = 6.
    assert clustered_wilson([[True, True], [True, False], [False, True], [False, False]]) == pytest.approx(wilson(3, 6))


def test_clustered_wilson_covers():
    """Problems of chance 0.1 or 0.7, three answers each: 95 % intervals hold the truth about as often; naive ones do
    not."""
    rng = np.random.default_rng(0)
    held = naive = 0
    runs = 600
    for _ in range(runs):
        chance = rng.choice([0.1, 0.7], size=80)
        clusters = rng.random((80, 3)) < chance[:, None]
        low, high = clustered_wilson(clusters.tolist())
        held += low <= 0.4 <= high
        low, high = wilson(int(clusters.sum()), clusters.size)
        naive += low <= 0.4 <= high
    assert 0.93 <= held / runs <= 0.98
    assert naive / runs < 0.91


@pytest.mark.parametrize("clusters", [[], [[True], []]])
def test_clusters_need_answers(clusters):
    with pytest.raises(ValueError, match="clusters"):
        clustered_wilson(clusters)


def test_sign_test_by_hand():
    # 5 discordant pairs, all one way: 2 / 2^5
    assert sign_test([True] * 6, [True] + [False] * 5) == pytest.approx(2 / 32)
    assert sign_test([True, False], [False, True]) == 1.0


def test_pass_at_k_is_the_mean_over_all_subsets():
    labels = [True, False, False, True, False]
    for k in range(1, 6):
        subsets = list(itertools.combinations(labels, k))
        assert pass_at_k(5, 2, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    assert pass_at_k(200, 200, 100) == 1.0
    assert pass_at_k(200, 0, 100) == 0.0
    for n, right, k in [(4, 1, 5), (4, 5, 1), (4, 1, 0)]:
        with pytest.raises(ValueError, match="pass_at_k"):
            pass_at_k(n, right, k)


def test_bootstrap_has_the_interval_of_the_binomial():
    # 100 problems, 60 right: the bootstrap distribution is Binomial(100, .6) / 100, with quantiles .50 and .69 or .70.
    low, high = bootstrap_interval([1.0] * 60 + [0.0] * 40)
    assert low == pytest.approx(0.50, abs=0.011)
    assert high == pytest.approx(0.695, abs=0.011)
    with pytest.raises(ValueError, match="values"):
        bootstrap_interval([])


def test_paired_bootstrap_by_enumeration():
    """All 3^3 resamples of three problems, against drawn ones."""
    a, b = [1.0, 1.0, 0.0], [0.0, 1.0, 0.5]
    means = [sum(a[i] - b[i] for i in chosen) / 3 for chosen in itertools.product(range(3), repeat=3)]
    found = paired_bootstrap(a, b, resamples=200_000)
    assert found.difference == pytest.approx(0.5 / 3)
    assert found.problems == 3
    assert found.bootstrap_p == pytest.approx(2 * sum(mean <= 0 for mean in means) / 27, abs=0.01)
    assert found.p == 1.0  # of two that differ, one is better on either side


def test_few_problems_prove_little():
    """Of one problem every resample is the same: the bootstrap's p would be .0002."""
    assert paired_bootstrap([1.0], [0.0]).p == 1.0
    for n in range(2, 12):
        found = paired_bootstrap([1.0] * n, [0.0] * n)
        assert found.bootstrap_p == 2 / 10_001
        assert found.p == pytest.approx(2 / 2**n)
    assert paired_bootstrap([1.0] * 20, [0.0] * 20).p == 2 / 10_001
    rng = np.random.default_rng(5)
    for n in (5, 40, 200):
        a, b = rng.random((2, n)) < 0.5
        assert paired_bootstrap(a, b).p >= sign_test(a, b)


def test_sign_test_takes_numpy_and_any_number_of_pairs():
    """Binomial coefficients of 63 pairs and more are beyond numpy's integers."""
    for n in (62, 63, 64, 200, 2000):
        a, b = np.zeros(n, bool), np.zeros(n, bool)
        a[: n // 2 - 5], b[n // 2 - 5 :] = True, True
        tail = sum(math.comb(n, k) for k in range(n // 2 - 4))
        assert sign_test(a, b) == sign_test(a.tolist(), b.tolist()) == pytest.approx(2 * tail / 2**n)
    assert sign_test(np.ones(1500, bool), np.zeros(1500, bool)) == 0.0


def test_paired_bootstrap_is_antisymmetric_and_a_function_of_its_arguments():
    rng = np.random.default_rng(3)
    a, b = rng.random(50), rng.random(50)
    one, other = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert one == paired_bootstrap(a, b)
    assert one.difference == -other.difference
    assert one.p == pytest.approx(other.p, abs=0.03)
    assert paired_bootstrap(a, a).p == 1.0
    assert paired_bootstrap(a + 1, a).p == 2 / 10_001
    with pytest.raises(ValueError, match="a has 2"):
        paired_bootstrap([1, 0], [1])


def test_paired_bootstrap_rejects_a_true_null_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    runs = 400
    rejected = covered = 0
    for _ in range(runs):
        chance = rng.random(100)
        a, b = (rng.random((2, 100)) < chance).astype(float)
        found = paired_bootstrap(a, b, resamples=1000)
        rejected += found.p < 0.05
        covered += found.low <= 0 <= found.high
    assert 0.02 <= rejected / runs <= 0.08
    assert 0.92 <= covered / runs <= 0.98


def test_auc_by_hand():
    assert auc([3, 2], [1, 0]) == 1.0
    assert auc([0, 1], [2]) == 0.0
    assert auc([1, 3], [2, 2]) == 0.5
    assert auc([1, 2, 2], [2, 0]) == pytest.approx((1 + 0 + 2 + 1 * 0.5 + 1 * 0.5) / 6)
    assert math.isnan(auc([], [1]))


def test_harmonic_mean():
    assert harmonic_mean(0.5, 0.25) == pytest.approx(1 / 3)
    assert harmonic_mean(0.0, 0.0) == 0.0
    assert harmonic_mean(0.0, 1.0) == 0.0


def test_no_model_library_is_needed(tmp_path):
    code = (
        "import sys; import prm_search.evaluation, prm_search.evaluation.statistics; "
        "print([m for m in ('torch', 'transformers', 'scipy', 'matplotlib') if m in sys.modules])"
    )
    assert python(code, tmp_path).splitlines()[-1] == "[]"
