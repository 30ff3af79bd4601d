"""Thompson sampling of arms whose scores are seen one at a time: what AdaptiveBranch decides by."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from itertools import islice

import numpy as np

from ..rng import strategy_lineage
from ..tree import SearchTree

FEW = 24  # arms; more of them are sampled together by numpy
BLOCK = 512  # random numbers drawn at a time
SURE = 0.01  # a Beta prior's mean keeps so far from 0 and 1
FRESH = 1.25  # trend and scale are set anew when there are so many times as many scores


class Moments:
    """The scores that arms have given, by row: their number and sums, in the unit of the values, and a posterior.

    A score comes with its depth in steps, so that means and variances can be had of scores less a trend times their
    depth, whatever the trend has become by then.

    Attributes:
        barred: how many rows must not be chosen.
        n, total, squares, depths, depth_squares, products: sums over an arm's scores of 1, v, v^2, d, d^2 and v d.
        own, own_depth: a row's own value, where its prior is centred, and the depth of that; NaN for none.
        penalty: -inf for a row that is barred, else 0.
        first, second, third: the posterior's numbers; see Thompson.
        version: of trend and scale, that the posterior is of.
    """

    __slots__ = (
        "barred", "depth_squares", "depths", "first", "n", "own", "own_depth", "penalty", "products", "second",
        "squares", "third", "total", "version",
    )  # fmt: skip

    def __init__(self, rows: int, own: float = math.nan, depth: int = 0) -> None:
        self.n, self.total, self.squares, self.penalty = (array("d", bytes(8 * rows)) for _ in range(4))
        self.depths, self.depth_squares, self.products = (array("d", bytes(8 * rows)) for _ in range(3))
        self.first, self.second, self.third = (array("d", bytes(8 * rows)) for _ in range(3))
        self.own, self.own_depth = array("d", [own] * rows), array("d", [float(depth)] * rows)
        self.barred, self.version = 0, -1

    def add_row(self, own: float, depth: int, *, barred: bool = False) -> int:
        """Append an arm, and return its row."""
        for column in (
            self.n, self.total, self.squares, self.penalty, self.depths, self.depth_squares, self.products, self.first,
            self.second, self.third,
        ):  # fmt: skip
            column.append(0.0)
        self.own.append(own)
        self.own_depth.append(float(depth))
        row = len(self.n) - 1
        if barred:
            self.bar(row)
        return row

    def bar(self, row: int) -> None:
        """Let an arm never be chosen again."""
        self.barred += self.penalty[row] == 0.0
        self.penalty[row] = -math.inf


class Thompson:
    """Posterior draws of what arms may give, scores on the scale of [0, 1] between the lowest and the highest seen.

    "gaussian": mean and variance of an arm have a normal-inverse-chi-square prior with kappa = 1 and nu = 1 around m,
    and a noise tau^2. The mean's posterior is then a Student t with nu + n degrees of freedom around its centre
    (A. Gelman et al., "Bayesian Data Analysis", 3rd ed., section 3.3), drawn from two uniform numbers by R. W. Bailey's
    polar method ("Polar generation of random variates with the t-distribution", Mathematics of Computation 62, 1994).
    "beta": Beta(m, 1 - m), each score a share of a success.

    Published: m = 0 and tau^2 = .1 (gaussian), m = 1/2 (beta), and scores as they are. Otherwise m is a row's own
    value, where it has one, tau^2 = .01, and scores are less the trend: the mean change of a value from a step to the
    next one, times their depth.

    A posterior is computed when its arm gets a score, not when it is drawn from. Trend and scale, which are of all
    scores, are set anew whenever there are a quarter more of them; posteriors follow when their node is walked through.

    Args:
        tree: of the search; the numbers are a function of its seed and its prompt alone.
        prior: "gaussian" or "beta".
        published: see above.
    """

    def __init__(self, tree: SearchTree, prior: str, *, published: bool) -> None:
        key = (tree.seed ^ tree.stream ^ strategy_lineage(2)) & (2**64 - 1)
        self._numbers = np.random.Generator(np.random.Philox(key=key))
        self._polar = self._pairs()
        self._gaussian, self._published = prior == "gaussian", published
        self._noise = 0.1 if published else 0.01
        self._none = 0.0 if self._gaussian else 0.5  # m of a row without a value of its own
        self._ends: dict[int, tuple[float, float]] = {}  # depth -> lowest and highest score
        self._gained, self._steps, self._scores, self._due = 0.0, 0, 0, 1.0
        self._low, self._high = math.inf, -math.inf  # of the scores
        self._trend, self._least, self._width = 0.0, 0.0, 0.0
        self._version = 0

    # -- scores -------------------------------------------------------------------------------------------------------

    def finite(self, score: float) -> float:
        """Return a score; an infinite one becomes the nearest end of what was seen."""
        if math.isfinite(score):
            return score
        return (self._low if score < 0 else self._high) if self._low <= self._high else 0.0

    def seen(self, score: float, depth: int, gained: float, steps: int) -> float:
        """Take a score into the range, and return it as `finite` does.

        Args:
            score: of a node.
            depth: of this node, in steps.
            gained: by its last steps; infinite where the score is.
            steps: so many of them.
        """
        score = self.finite(score)
        self._low, self._high = min(self._low, score), max(self._high, score)
        low, high = self._ends.get(depth, (score, score))
        self._ends[depth] = min(low, score), max(high, score)
        self._scores += 1
        if not self._published and math.isfinite(gained):
            self._gained += gained
            self._steps += steps
        return score

    def settle(self) -> None:
        """Set trend and scale to what was seen, where that is a quarter more than before."""
        if self._scores < self._due:
            return
        self._due = max(self._scores + 1.0, FRESH * self._scores)
        self._trend = self._gained / self._steps if self._steps else 0.0
        self._least = min(low - self._trend * depth for depth, (low, _) in self._ends.items())
        self._width = max(high - self._trend * depth for depth, (_, high) in self._ends.items()) - self._least
        self._version += 1

    def add(self, moments: Moments, row: int, score: float, depth: int) -> None:
        """Take in a score of an arm, at a depth in steps."""
        moments.n[row] += 1.0
        moments.total[row] += score
        moments.squares[row] += score * score
        moments.depths[row] += depth
        moments.depth_squares[row] += depth * depth
        moments.products[row] += score * depth
        if moments.version == self._version:
            self._compute(moments, row)

    # -- posteriors ---------------------------------------------------------------------------------------------------

    def renew(self, moments: Moments) -> None:
        """Compute every posterior of a node anew, where trend and scale have changed since."""
        if moments.version != self._version:
            moments.version = self._version
            for row in range(len(moments.n)):
                self._compute(moments, row)

    def _compute(self, moments: Moments, row: int) -> None:
        """Set a row's posterior: centre, factor and 1 / nu of a Student t, or the two numbers of a Beta."""
        n, width, trend = moments.n[row], self._width, self._trend
        mean, spread, centre = 0.5, 0.0, self._none
        if width > 0.0:
            if n:
                raw = (moments.total[row] - trend * moments.depths[row]) / n
                squares = moments.squares[row] - trend * (
                    2.0 * moments.products[row] - trend * moments.depth_squares[row]
                )
                mean, spread = (raw - self._least) / width, max(0.0, squares / n - raw * raw) / width**2
            own = moments.own[row]
            if not self._published and own == own:
                centre = (own - trend * moments.own_depth[row] - self._least) / width
        if self._gaussian:
            kappa = nu = 1.0 + n
            scale = (self._noise + n * spread + n * (mean - centre) ** 2 / kappa) / nu
            moments.first[row] = (centre + n * mean) / kappa
            moments.second[row], moments.third[row] = math.sqrt(nu * scale / kappa), 1.0 / nu
        else:
            good, sure = n * min(max(mean, 0.0), 1.0), min(max(centre, SURE), 1.0 - SURE)
            moments.first[row], moments.second[row] = sure + good, 1.0 - sure + n - good

    # -- draws --------------------------------------------------------------------------------------------------------

    def sample(self, moments: Moments, row: int) -> float:
        """Draw what one arm may give. Its node's posteriors are up to date: see `renew`."""
        if not self._gaussian:
            return float(self._numbers.beta(moments.first[row], moments.second[row]))
        far, cosine = next(self._polar)
        return moments.first[row] + moments.second[row] * cosine * math.sqrt(math.expm1(far * moments.third[row]))

    def best(self, moments: Moments, first: int) -> tuple[float, int]:
        """Draw what every arm from row `first` on may give; the largest of those that are not barred, and its row."""
        rows = len(moments.n)
        if rows - first > FEW:
            drawn = self._together(moments, first) + np.frombuffer(moments.penalty)[first:]
            place = int(drawn.argmax())
            return float(drawn[place]), first + place
        if not self._gaussian:
            return max((self.sample(moments, row), row) for row in range(first, rows) if moments.penalty[row] == 0.0)
        top, best = -math.inf, first
        sqrt, expm1 = math.sqrt, math.expm1  # this loop is most of what a walk takes
        columns = zip(moments.first, moments.second, moments.third, moments.penalty, strict=True)
        for row, (arm, (far, cosine)) in enumerate(zip(islice(columns, first, None), self._polar, strict=False), first):
            centre, factor, inverse, penalty = arm
            worth = centre + factor * cosine * sqrt(expm1(far * inverse))
            if worth > top and not penalty:
                top, best = worth, row
        return top, best

    def _together(self, moments: Moments, start: int) -> np.ndarray:
        """`sample` of every row from `start` on, [rows] float64."""
        first, second, third = (np.frombuffer(x)[start:] for x in (moments.first, moments.second, moments.third))
        if not self._gaussian:
            return self._numbers.beta(first, second)
        far, cosine = self._polar_numbers(len(first))
        drawn: np.ndarray = first + second * cosine * np.sqrt(np.expm1(far * third))
        return drawn

    def _polar_numbers(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return -2 log u and cos(2 pi v) of uniform numbers u and v, [n] each."""
        u, v = self._numbers.random((2, n))
        return -2.0 * np.log1p(-u), np.cos(2.0 * np.pi * v)

    def _pairs(self) -> Iterator[tuple[float, float]]:
        """The same, one pair at a time."""
        while True:
            far, cosine = self._polar_numbers(BLOCK)
            yield from zip(far.tolist(), cosine.tolist(), strict=True)
