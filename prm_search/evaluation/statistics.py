"""The statistics of an evaluation: intervals, paired tests, pass@k, F1 and AUC. Only numpy, no torch.

Outcomes come in clusters: one problem answered under several seeds. Its answers resemble each other, so the problem is
the unit of every interval and test here. Further seeds make a problem's share of right answers more exact; they do not
count as further problems.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np

from ..checks import integer, shown

Z95 = 1.959964
RESAMPLES = 10_000


def wilson(successes: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (E. B. Wilson, 1927).

    Args:
        successes, n: counts, 0 <= successes <= n; not integers where n is an effective sample size.
        z: quantile of the normal distribution; the default gives 95 %.

    Raises:
        ValueError: n is not above 0, or successes lies outside it.
    """
    said = f"successes={shown(successes)} of n={shown(n)}"
    if any(isinstance(given, bool) or not isinstance(given, Real) for given in (successes, n)):
        raise TypeError(f"{said}: numbers are needed")
    if not 0 < n <= sys.float_info.max or not 0 <= successes <= n:
        raise ValueError(f"{said}: n > 0 and 0 <= successes <= n are needed")
    p, d = successes / n, 1 + z * z / n
    centre, half = (p + z * z / (2 * n)) / d, z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    return max(0.0, centre - half), min(1.0, centre + half)


def clustered_wilson(clusters: Sequence[Sequence[bool]], z: float = Z95) -> tuple[float, float]:
    """Wilson's interval of the share of right answers, for problems that were answered several times.

    n in Wilson's formula is the effective sample size m / deff (Kish 1965): m answers, deff the variance of the share
    over problems (ratio estimator, problems as clusters) over what m independent answers would have. It is kept between
    the number of problems and m; one answer a problem gives the plain interval.

    Args:
        clusters: for each problem its answers, right or wrong; at least one each.

    Raises:
        ValueError: there are no problems, or one has no answers.
    """
    sizes = np.array([len(cluster) for cluster in clusters], np.float64)
    if not len(sizes) or not sizes.all():
        raise ValueError("clusters: at least one problem, each with at least one answer, is needed")
    right = np.array([sum(cluster) for cluster in clusters], np.float64)
    problems, answers = len(sizes), float(sizes.sum())
    p = float(right.sum()) / answers
    n = float(problems)
    if problems > 1 and 0 < p < 1:
        variance = problems / (problems - 1) * float(((right - p * sizes) ** 2).sum()) / answers**2
        n = answers if variance == 0 else min(answers, max(n, p * (1 - p) / variance))
    return wilson(p * n, n, z)


def sign_test(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Two-sided exact sign test (McNemar) of paired outcomes: how likely so uneven a split is if both are as good."""
    pairs = [(bool(x), bool(y)) for x, y in zip(a, b, strict=True)]  # Python's own: numpy's integers overflow below
    return _sign_test(sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs))


def _sign_test(one: int, other: int) -> float:
    """The two-sided p of so many wins of one side and of the other."""
    n = one + other
    tail = sum(math.comb(n, k) for k in range(min(one, other) + 1))
    return min(1.0, 2 * tail / 2**n)


@dataclass(frozen=True)
class Comparison:
    """A paired difference of two means over the same problems.

    Attributes:
        difference: mean of a - b.
        low, high: its 95 % percentile interval.
        p: two-sided: the larger of bootstrap_p and the exact sign test's.
        problems: how many both have.
        bootstrap_p: two-sided; at least 2 / (resamples + 1).
    """

    difference: float
    low: float
    high: float
    p: float
    problems: int
    bootstrap_p: float = math.nan


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> Comparison:
    """Paired bootstrap of a difference of means (Efron and Tibshirani 1993, ch. 13 and 15; Koehn 2004 for pairs).

    Problems are drawn with replacement, each with both of its figures. The interval is the percentile interval of the
    resampled differences; the bootstrap's p inverts it: 2 (1 + min(#{d* <= 0}, #{d* >= 0})) / (resamples + 1), at most
    1. With few problems the bootstrap's p is far too small (of one problem every resample is the same). So p is the
    larger of the bootstrap's and the exact sign test's over the problems whose figures differ.

    Args:
        a, b: [P] figures of the same problems, in the same order: of a problem with several seeds, the mean.
        resamples: bootstrap samples.
        seed: of the draws; the result is a function of the arguments.

    Raises:
        ValueError: lengths differ, or there are no problems.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"a has {len(a)} problems and b {len(b)}: the same ones, at least one, are needed")
    differences = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    means = _resampled(differences, resamples, seed)
    low, high = np.quantile(means, (0.025, 0.975))
    tail = min(int((means <= 1e-12).sum()), int((means >= -1e-12).sum()))
    exact = _sign_test(int((differences > 1e-12).sum()), int((differences < -1e-12).sum()))
    p = min(1.0, 2 * (1 + tail) / (resamples + 1))
    return Comparison(float(differences.mean()), float(low), float(high), max(exact, p), len(differences), p)


def bootstrap_interval(values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of a figure a problem. Raises ValueError without problems."""
    if not len(values):
        raise ValueError("values is empty: at least one problem is needed")
    low, high = np.quantile(_resampled(np.asarray(values, np.float64), resamples, seed), (0.025, 0.975))
    return float(low), float(high)


def _resampled(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of bootstrap samples: [resamples]. Equal values are drawn together, as one multinomial count."""
    distinct, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=resamples)
    means: np.ndarray = drawn @ distinct / len(values)
    return means


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that k answers hold a right one, 1 - C(n - right, k) / C(n, k).

    Source: Chen et al. 2021 (arXiv 2107.03374), eq. 1.

    Args:
        n: answers drawn.
        right: how many of them are right.
        k: 1 to n.

    Raises:
        ValueError: the numbers do not fit.
    """
    for name, value in (("n", n), ("right", right), ("k", k)):
        integer(name, value, 0, "an integer >= 0")
    if not 1 <= k <= n or not 0 <= right <= n:
        raise ValueError(f"pass_at_k(n={n}, right={right}, k={k}): 1 <= k <= n and 0 <= right <= n are needed")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def auc(right: Sequence[float], wrong: Sequence[float]) -> float:
    """Chance that a right item has a higher score than a wrong one, ties counted half (Mann and Whitney 1947).

    NaN where there are no right or no wrong ones.
    """
    if not len(right) or not len(wrong):
        return math.nan
    ordered = np.sort(np.asarray(wrong, np.float64))
    scores = np.asarray(right, np.float64)
    below = np.searchsorted(ordered, scores, "left") + np.searchsorted(ordered, scores, "right")
    return float(below.sum() / (2 * len(scores) * len(ordered)))


def harmonic_mean(a: float, b: float) -> float:
    """2ab / (a + b); 0 where both are 0."""
    return 0.0 if a + b == 0 else 2 * a * b / (a + b)


def clustered_bootstrap(
    counts: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a function of counts, with problems drawn whole.

    Args:
        counts: [P, C] what each problem adds to each of C counts.
        statistic: [R, C] sums over resampled problems -> [R] figures; NaN where one is undefined, which are left out.
        resamples, seed: as in paired_bootstrap.

    Raises:
        ValueError: there are no problems.
    """
    counts = np.asarray(counts, np.float64)
    if not len(counts):
        raise ValueError("counts is empty: at least one problem is needed")
    rng = np.random.default_rng(seed)
    figures = []
    for first in range(0, resamples, 500):  # bounds the memory: [500, P] at once
        drawn = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), min(500, resamples - first))
        figures.append(statistic(drawn @ counts))
    low, high = np.nanquantile(np.concatenate(figures), (0.025, 0.975))
    return float(low), float(high)
