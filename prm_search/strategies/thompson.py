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
SURE = 0.01  # a Beta prior's mean keeps so far from 0 and 1


class Moments:
    """The scores that arms have given, by row: their number and sums, in the unit of the values.

    A score comes with its depth in steps, so that means and variances can be had of scores less a trend times their
    depth, whatever the trend has become by then.

    Attributes:
        barred: how many rows must not be chosen.
        n, total, squares, depths, depth_squares, products: sums over an arm's scores of 1, v, v^2, d, d^2 and v d.
        own, own_depth: a row's own value, where its prior is centred, and the depth of that; NaN for none.
        penalty: -inf for a row that is barred, else 0.
    """

    __slots__ = (
        "barred", "depth_squares", "depths", "n", "own", "own_depth", "penalty", "products", "squares", "total",
    )  # fmt: skip

    def __init__(self, rows: int, own: float = math.nan, depth: int = 0) -> None:
        self.n, self.total, self.squares, self.penalty = (array("d", bytes(8 * rows)) for _ in range(4))
        self.depths, self.depth_squares, self.products = (array("d", bytes(8 * rows)) for _ in range(3))
        self.own, self.own_depth = array("d", [own] * rows), array("d", [float(depth)] * rows)
        self.barred = 0

    def add_row(self, own: float, depth: int, *, barred: bool = False) -> int:
        """Append an arm, and return its row."""
        for column in (
            self.n, self.total, self.squares, self.penalty, self.depths, self.depth_squares, self.products,
        ):  # fmt: skip
            column.append(0.0)
        self.own.append(own)
        self.own_depth.append(float(depth))
        row = len(self.n) - 1
        if barred:
            self.bar(row)
        return row

    def add(self, row: int, score: float, depth: int) -> None:
        """Take in a score of an arm, at a depth in steps."""
        self.n[row] += 1.0
        self.total[row] += score
        self.squares[row] += score * score
        self.depths[row] += depth
        self.depth_squares[row] += depth * depth
        self.products[row] += score * depth

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

    Published: m = 0 and tau^2 = .1 (gaussian), m = 1/2 (beta), and scores as they are. Otherwise m is a row's own value,
    where it has one, tau^2 = .01, and scores are less the trend: the mean change of a value from a step to the next
    one, times their depth.

    Args:
        tree: of the search; the numbers are a function of its seed and its prompt alone.
        prior: "gaussian" or "beta".
        published: see above.
    """

    def __init__(self, tree: SearchTree, prior: str, *, published: bool) -> None:
        key = (tree.seed ^ tree.stream ^ strategy_lineage(2)) & (2**64 - 1)
        self._numbers = np.random.Generator(np.random.Philox(key=key))
        self._uniforms: Iterator[float] = iter(())
        self._gaussian, self._published = prior == "gaussian", published
        self._noise = 0.1 if published else 0.01
        self._none = 0.0 if self._gaussian else 0.5  # m of a row without a value of its own
        self._low, self._high = math.inf, -math.inf  # of the scores
        self._ends: dict[int, tuple[float, float]] = {}  # depth -> lowest and highest score
        self._gained, self._steps = 0.0, 0
        self._trend, self._least, self._width = 0.0, 0.0, 0.0

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
            gained: by its last steps, before an infinite score is cut.
            steps: so many of them.
        """
        score = self.finite(score)
        self._low, self._high = min(self._low, score), max(self._high, score)
        low, high = self._ends.get(depth, (score, score))
        self._ends[depth] = min(low, score), max(high, score)
        if not self._published and math.isfinite(gained):
            self._gained += gained
            self._steps += steps
        return score

    def settle(self) -> None:
        """Set trend and scale to what was seen; once before draws that share a posterior."""
        self._trend = self._gained / self._steps if self._steps else 0.0
        if not self._ends:
            return
        self._least = min(low - self._trend * depth for depth, (low, _) in self._ends.items())
        self._width = max(high - self._trend * depth for depth, (_, high) in self._ends.items()) - self._least

    def sample(self, moments: Moments, row: int) -> float:
        """Draw what one arm may give."""
        n, width, trend = moments.n[row], self._width, self._trend
        if n == 0.0 or width <= 0.0:
            mean, spread = 0.5 * (n > 0.0), 0.0
        else:
            raw = (moments.total[row] - trend * moments.depths[row]) / n
            squares = moments.squares[row] - trend * (
                2.0 * moments.products[row] - trend * moments.depth_squares[row]
            )
            mean, spread = (raw - self._least) / width, max(0.0, squares / n - raw * raw) / width**2
        own = moments.own[row]
        if self._published or own != own or width <= 0.0:
            centre = self._none
        else:
            centre = (own - trend * moments.own_depth[row] - self._least) / width
        if not self._gaussian:
            good, sure = n * min(max(mean, 0.0), 1.0), min(max(centre, SURE), 1.0 - SURE)
            return float(self._numbers.beta(sure + good, 1.0 - sure + n - good))
        kappa = nu = 1.0 + n
        scale = (self._noise + n * spread + n * (mean - centre) ** 2 / kappa) / nu
        u, angle = 1.0 - self._uniform(), self._uniform()
        student = math.sqrt(nu * (u ** (-2.0 / nu) - 1.0)) * math.cos(2.0 * math.pi * angle)
        return (centre + n * mean) / kappa + math.sqrt(scale / kappa) * student

    def best(self, moments: Moments, first: int) -> tuple[float, int]:
        """Draw what every arm from row `first` on may give; the largest of those that are not barred, and its row."""
        rows = len(moments.n)
        if rows - first <= FEW:
            top, best = -math.inf, first
            for row in range(first, rows):
                if moments.penalty[row] == 0.0:
                    drawn = self.sample(moments, row)
                    if drawn > top:
                        top, best = drawn, row
            return top, best
        together = self._together(moments, first) + np.frombuffer(moments.penalty)[first:]
        row = int(together.argmax())
        return float(together[row]), first + row

    def _together(self, moments: Moments, first: int) -> np.ndarray:
        """`sample` of every row from `first` on, [rows] float64."""
        trend, width = self._trend, self._width
        n, own, own_depth = (np.frombuffer(x)[first:] for x in (moments.n, moments.own, moments.own_depth))
        seen = np.maximum(n, 1.0)
        if width <= 0.0:
            mean, spread, centre = 0.5 * (n > 0), np.zeros(len(n)), np.full(len(n), self._none)
        else:
            columns = (moments.total, moments.squares, moments.depths, moments.depth_squares, moments.products)
            total, squares, depths, depth_squares, products = (np.frombuffer(x)[first:] for x in columns)
            raw = (total - trend * depths) / seen
            squares = squares - trend * (2.0 * products - trend * depth_squares)
            mean = np.where(n > 0, (raw - self._least) / width, 0.0)
            spread = np.maximum(0.0, squares / seen - raw * raw) / width**2
            centre = (own - trend * own_depth - self._least) / width
            centre = np.where(np.isnan(own) | self._published, self._none, centre)
        if not self._gaussian:
            good, sure = n * np.clip(mean, 0.0, 1.0), np.clip(centre, SURE, 1.0 - SURE)
            return self._numbers.beta(sure + good, 1.0 - sure + n - good)
        kappa = nu = 1.0 + n
        scale = (self._noise + n * spread + n * np.square(mean - centre) / kappa) / nu
        u, angle = 1.0 - self._numbers.random(len(n)), self._numbers.random(len(n))
        student = np.sqrt(nu * (u ** (-2.0 / nu) - 1.0)) * np.cos(2.0 * np.pi * angle)
        drawn: np.ndarray = (centre + n * mean) / kappa + np.sqrt(scale / kappa) * student
        return drawn

    def _uniform(self) -> float:
        """The next uniform number in [0, 1)."""
        number = next(self._uniforms, None)
        if number is None:
            self._uniforms = iter(self._numbers.random(BLOCK).tolist())
            number = next(self._uniforms)
        return number
