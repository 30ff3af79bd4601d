"""Thompson sampling of arms whose scores are seen one at a time: what AdaptiveBranch decides by."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator

import numpy as np

from ..rng import strategy_lineage
from ..tree import SearchTree

FEW = 12  # arms; more of them are sampled together by numpy
BLOCK = 512  # uniform numbers drawn at a time


class Moments:
    """The scores that arms have given: number, sum and sum of squares, in the unit of the values, by row.

    Attributes:
        barred: how many rows must not be chosen.
    """

    __slots__ = ("barred", "n", "penalty", "squares", "total")

    def __init__(self, rows: int) -> None:
        self.n, self.total, self.squares, self.penalty = (array("d", bytes(8 * rows)) for _ in range(4))
        self.barred = 0

    def add_row(self, *, barred: bool = False) -> int:
        """Append an arm, and return its row."""
        for column in (self.n, self.total, self.squares, self.penalty):
            column.append(0.0)
        row = len(self.n) - 1
        if barred:
            self.bar(row)
        return row

    def add(self, row: int, score: float) -> None:
        """Take in a score of an arm."""
        self.n[row] += 1.0
        self.total[row] += score
        self.squares[row] += score * score

    def bar(self, row: int) -> None:
        """Let an arm never be chosen again."""
        self.barred += self.penalty[row] == 0.0
        self.penalty[row] = -math.inf


class Thompson:
    """Posterior draws of what arms may give, scores on the scale of [0, 1] between the lowest and the highest seen.

    "gaussian": mean and variance of an arm have a normal-inverse-chi-square prior with m = 0, kappa = 1, nu = 1 and
    tau^2 = .1. The mean's posterior is then a Student t with nu + n degrees of freedom around its centre (A. Gelman et
    al., "Bayesian Data Analysis", 3rd ed., section 3.3), drawn from two uniform numbers by R. W. Bailey's polar method
    ("Polar generation of random variates with the t-distribution", Mathematics of Computation 62, 1994).
    "beta": Beta(1/2, 1/2), each score a share of a success.

    Args:
        tree: of the search; the numbers are a function of its seed and its prompt alone.
        prior: "gaussian" or "beta".
    """

    def __init__(self, tree: SearchTree, prior: str) -> None:
        key = (tree.seed ^ tree.stream ^ strategy_lineage(2)) & (2**64 - 1)
        self._numbers = np.random.Generator(np.random.Philox(key=key))
        self._uniforms: Iterator[float] = iter(())
        self._gaussian = prior == "gaussian"
        self._low, self._high = math.inf, -math.inf

    def seen(self, score: float) -> float:
        """Take a score into the range, and return it; an infinite one becomes the range's nearest end."""
        if not math.isfinite(score):
            score = (self._low if score < 0 else self._high) if self._low <= self._high else 0.0
        self._low, self._high = min(self._low, score), max(self._high, score)
        return score

    def sample(self, moments: Moments, row: int) -> float:
        """Draw what one arm may give."""
        n, width = moments.n[row], self._high - self._low
        if n == 0.0 or width <= 0.0:
            mean, spread = 0.5 * (n > 0.0), 0.0
        else:
            raw = moments.total[row] / n
            mean, spread = (raw - self._low) / width, max(0.0, moments.squares[row] / n - raw * raw) / width**2
        if not self._gaussian:
            good = n * min(max(mean, 0.0), 1.0)
            return float(self._numbers.beta(0.5 + good, 0.5 + n - good))
        kappa = nu = 1.0 + n
        scale = (0.1 + n * spread + n * mean * mean / kappa) / nu
        u, angle = 1.0 - self._uniform(), self._uniform()
        student = math.sqrt(nu * (u ** (-2.0 / nu) - 1.0)) * math.cos(2.0 * math.pi * angle)
        return n * mean / kappa + math.sqrt(scale / kappa) * student

    def best(self, moments: Moments, first: int) -> int:
        """Draw what every arm from row `first` on may give, and return the row of the largest that is not barred."""
        rows = len(moments.n)
        if rows - first <= FEW:
            top, best = -math.inf, first
            for row in range(first, rows):
                if moments.penalty[row] == 0.0:
                    drawn = self.sample(moments, row)
                    if drawn > top:
                        top, best = drawn, row
            return best
        return first + int((self._together(moments, first) + np.frombuffer(moments.penalty)[first:]).argmax())

    def _together(self, moments: Moments, first: int) -> np.ndarray:
        """`sample` of every row from `first` on, [rows] float64."""
        n, total, squares = (np.frombuffer(column)[first:] for column in (moments.n, moments.total, moments.squares))
        width, seen = self._high - self._low, np.maximum(n, 1.0)
        if width <= 0.0:
            mean, spread = 0.5 * (n > 0), np.zeros(len(n))
        else:
            raw = total / seen
            mean = np.where(n > 0, (raw - self._low) / width, 0.0)
            spread = np.maximum(0.0, squares / seen - raw * raw) / width**2
        if not self._gaussian:
            good = n * np.clip(mean, 0.0, 1.0)
            return self._numbers.beta(0.5 + good, 0.5 + n - good)
        kappa = nu = 1.0 + n
        scale = (0.1 + n * spread + n * mean * mean / kappa) / nu
        u, angle = 1.0 - self._numbers.random(len(n)), self._numbers.random(len(n))
        student = np.sqrt(nu * (u ** (-2.0 / nu) - 1.0)) * np.cos(2.0 * np.pi * angle)
        drawn: np.ndarray = n * mean / kappa + np.sqrt(scale / kappa) * student
        return drawn

    def _uniform(self) -> float:
        """The next uniform number in [0, 1)."""
        number = next(self._uniforms, None)
        if number is None:
            self._uniforms = iter(self._numbers.random(BLOCK).tolist())
            number = next(self._uniforms)
        return number
