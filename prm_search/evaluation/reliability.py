"""Reliability: do probabilities of success come true? Cross-fitted, with a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..calibration import Calibration, Method
from .statistics import wilson


@dataclass(frozen=True)
class Bin:
    """Responses of about equal probability.

    Attributes:
        predicted: mean probability.
        right, low, high: share of right ones, with Wilson's 95 % interval.
        count: responses.
    """

    predicted: float
    right: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Reliability:
    """The truth of probabilities.

    Attributes:
        bins: of equal numbers of responses, by rising probability.
        error: expected calibration error: the bins' mean |predicted - right|, by count.
        brier: mean squared error of the probabilities.
        base_brier: the same where every response has the share of right ones as its probability.
    """

    bins: tuple[Bin, ...]
    error: float
    brier: float
    base_brier: float


def cross_fitted(
    values: Sequence[float],
    labels: Sequence[bool],
    problems: Sequence[object],
    *,
    method: Method = "platt",
    folds: int = 5,
    seed: int = 0,
) -> list[float]:
    """Probabilities of responses, each by a calibration that was fitted without any response to its problem.

    Args:
        values, labels, method: see Calibration.fit.
        problems: which problem each response is to.
        folds: parts of the problems.
        seed: of the dealing.

    Raises:
        ValueError: there are fewer problems than folds, or as Calibration.fit in one of the parts.
    """
    distinct = list(dict.fromkeys(problems))
    if isinstance(folds, bool) or not isinstance(folds, int) or not 2 <= folds <= len(distinct):
        raise ValueError(f"folds={folds!r}: an integer from 2 to the number of problems, {len(distinct)}, is needed")
    dealt = np.random.default_rng(seed).permutation(len(distinct)) % folds
    part = {problem: int(fold) for problem, fold in zip(distinct, dealt, strict=True)}
    fold_of = [part[problem] for problem in problems]
    maps = []
    for fold in range(folds):
        rest = [place for place, own in enumerate(fold_of) if own != fold]
        maps.append(Calibration.fit([values[i] for i in rest], [labels[i] for i in rest], method=method))
    return [maps[fold](value) for fold, value in zip(fold_of, values, strict=True)]


def reliability(probabilities: Sequence[float], labels: Sequence[bool], *, bins: int = 10) -> Reliability:
    """Compare probabilities with what came of them.

    Args:
        probabilities: of responses, that they are right.
        labels: whether they are.
        bins: at most; fewer where there are fewer responses.

    Raises:
        ValueError: there are no responses, a number is no probability, or bins < 1.
    """
    p, right = np.asarray(probabilities, np.float64), np.asarray(labels, bool)
    if not len(p) or p.shape != right.shape or not ((p >= 0) & (p <= 1)).all():
        raise ValueError("probabilities: at least one number in [0, 1] is needed, and one label each")
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins={bins!r}: an integer >= 1 is needed")
    order = np.argsort(p, kind="stable")
    made = []
    for part in np.array_split(order, min(bins, len(p))):
        low, high = wilson(int(right[part].sum()), len(part))
        made.append(Bin(float(p[part].mean()), float(right[part].mean()), low, high, len(part)))
    error = sum(one.count * abs(one.predicted - one.right) for one in made) / len(p)
    base = float(right.mean())
    return Reliability(tuple(made), float(error), float(((p - right) ** 2).mean()), base * (1 - base))


def plot_reliability(found: Reliability, path: Path, title: str) -> None:
    """Draw a reliability diagram as a PNG. Needs matplotlib, of the extra `bench`."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install 'prm-search[bench]'") from error
    figure = Figure(figsize=(5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(
        xlabel="predicted probability", ylabel="share of right responses", xlim=(0, 1), ylim=(0, 1), title=title
    )
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, label="as predicted")
    x, y = [one.predicted for one in found.bins], [one.right for one in found.bins]
    below = [max(0.0, one.right - one.low) for one in found.bins]
    above = [max(0.0, one.high - one.right) for one in found.bins]
    axes.errorbar(x, y, yerr=(below, above), marker="o", capsize=2, linewidth=1.2, label=f"error {found.error:.3f}")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)
