"""Resampling schemes of sequential Monte Carlo: how many offspring each of N weighted particles has.

Each scheme is unbiased: a particle of normalised weight w has N * w offspring in expectation. Source: R. Douc,
O. Cappe, E. Moulines, "Comparison of Resampling Schemes for Particle Filtering", ISPA 2005.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

Uniforms = Callable[[int], np.ndarray]  # n -> the next n uniform numbers in [0, 1)


def log_mean_exp(log_weights: Sequence[float] | np.ndarray) -> float:
    """Return log(mean(exp(log_weights))), nats; -inf where every weight is 0."""
    values = np.asarray(log_weights, np.float64)
    top = float(values.max())
    return top if not math.isfinite(top) else top + math.log(float(np.exp(values - top).mean()))


def normalised(log_weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return [N] float64 weights that sum to 1. Equal ones where every weight is 0."""
    values = np.asarray(log_weights, np.float64)
    top = float(values.max())
    if top == -math.inf:
        return np.full(len(values), 1 / len(values))
    # Infinite weights share everything between them.
    raised = (values == top).astype(np.float64) if top == math.inf else np.exp(values - top)
    return raised / raised.sum()


def effective_size(weights: np.ndarray) -> float:
    """Return Kish's effective sample size 1 / sum(w^2) of [N] normalised weights, in [1, N]."""
    return 1.0 / float(np.square(weights).sum())


def multinomial(weights: np.ndarray, n: int, uniforms: Uniforms) -> np.ndarray:
    """Return [N] int64 offspring counts: n independent draws."""
    return _counts(weights, np.sort(uniforms(n)))


def stratified(weights: np.ndarray, n: int, uniforms: Uniforms) -> np.ndarray:
    """Return [N] int64 offspring counts: one draw in each of n equal strata."""
    return _counts(weights, (np.arange(n) + uniforms(n)) / n)


def systematic(weights: np.ndarray, n: int, uniforms: Uniforms) -> np.ndarray:
    """Return [N] int64 offspring counts: one number for all strata. Least variance in most uses."""
    return _counts(weights, (np.arange(n) + uniforms(1)[0]) / n)


def residual(weights: np.ndarray, n: int, uniforms: Uniforms) -> np.ndarray:
    """Return [N] int64 offspring counts: floor(n w) for sure, the rest by multinomial draws of what is left."""
    sure = np.floor(n * weights + 1e-9).astype(np.int64)
    left = n - int(sure.sum())
    if left <= 0:
        return sure
    rest = np.maximum(n * weights - sure, 0.0)
    return sure + multinomial(rest / rest.sum(), left, uniforms)


def _counts(weights: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return how many of the rising points in [0, 1) fall to each weight; a weight of 0 gets none."""
    edges = np.cumsum(weights)
    edges[np.flatnonzero(weights)[-1] :] = 1.0  # rounding must not leave a point beyond the last positive weight
    return np.bincount(np.searchsorted(edges, points, side="right"), minlength=len(weights)).astype(np.int64)


SCHEMES: Mapping[str, Callable[[np.ndarray, int, Uniforms], np.ndarray]] = MappingProxyType(
    {"systematic": systematic, "multinomial": multinomial, "residual": residual, "stratified": stratified}
)
