"""Step errors: does a pair find the first wrong step of a solution?

Source of task and F1: Zheng et al. 2024 (ProcessBench, arXiv 2412.06559): the first step whose score is below a
threshold is said to be wrong, none (-1) where no score is; F1 is the harmonic mean of the accuracies on solutions with
an error and on correct ones. Its authors choose a PRM's threshold on one part of the data and report it on others. So
does this module: a threshold never comes from the data that it is reported on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np

from .statistics import auc, clustered_bootstrap, harmonic_mean, wilson


def first_below(scores: Sequence[float], threshold: float) -> int:
    """Place of the first score below the threshold; -1 for none."""
    return next((index for index, score in enumerate(scores) if score < threshold), -1)


def fit_threshold(scores: Sequence[Sequence[float]], labels: Sequence[int]) -> float:
    """The threshold with the best F1 on these solutions: every one that tells them apart differently is tried.

    Among equally good thresholds the middle one (by place among those tried) is taken. A solution with its first error
    at l is met by thresholds in (s_l, min of the scores before l], a correct one by those up to its lowest score.

    Args:
        scores: for each solution its steps' scores.
        labels: for each the first wrong step, or -1.

    Raises:
        ValueError: solutions with an error, or solutions without, are missing.
    """
    low, high, lowest = [], [], []
    wrong = 0
    for solution_scores, label in zip(scores, labels, strict=True):
        if label < 0:
            lowest.append(min(solution_scores))
            continue
        wrong += 1
        before = min(solution_scores[:label], default=math.inf)
        if solution_scores[label] < before:
            low.append(solution_scores[label])
            high.append(before)
    if not wrong or not lowest:
        raise ValueError("a threshold needs solutions with an error and solutions without")
    edges = np.unique([edge for edge in (*low, *high, *lowest) if math.isfinite(edge)])
    tried = np.concatenate([[edges[0] - 1], (edges[1:] + edges[:-1]) / 2, [edges[-1] + 1]])
    met = np.searchsorted(np.sort(low), tried, "left") - np.searchsorted(np.sort(high), tried, "left")
    kept = len(lowest) - np.searchsorted(np.sort(lowest), tried, "left")
    figures = _f1(np.stack([met, np.full(len(tried), wrong), kept, np.full(len(tried), len(lowest))], 1))
    best = np.flatnonzero(figures >= figures.max() - 1e-12)
    return float(tried[best[len(best) // 2]])


def _f1(counts: np.ndarray) -> np.ndarray:
    """[R, 4] (met, wrong, kept, correct) -> [R]: F1; NaN where there are no wrong or no correct solutions."""
    with np.errstate(invalid="ignore", divide="ignore"):
        a, b = counts[:, 0] / counts[:, 1], counts[:, 2] / counts[:, 3]
        figures: np.ndarray = np.where(a + b > 0, 2 * a * b / np.where(a + b > 0, a + b, 1), a + b)
    return figures


# -- the table ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepRow:
    """One step score's success at finding errors.

    Attributes:
        value: the score.
        f1, f1_low, f1_high: harmonic mean of the two accuracies; bootstrap over problems, thresholds held fixed.
        error_accuracy, correct_accuracy: shares of the solutions with an error whose first wrong step was found, and
            of the correct ones in which none was.
        thresholds: those used; one a fold.
        auc: chance that a right step has a higher score than a first wrong one, over all steps up to the first error.
        lowest_is_first, lowest_low, lowest_high: share of the solutions with an error whose lowest score is at the
            first wrong step; Wilson's interval.
    """

    value: str
    f1: float
    f1_low: float
    f1_high: float
    error_accuracy: float
    correct_accuracy: float
    thresholds: list[float]
    auc: float
    lowest_is_first: float
    lowest_low: float
    lowest_high: float


@dataclass(frozen=True)
class StepSummary:
    """The table.

    Attributes:
        erroneous, correct: solutions with and without an error.
        chance: that a step picked at random is the first wrong one, mean over solutions with an error.
        folds: parts between which thresholds were crossed; 0 where they came from elsewhere.
        rows: one a score.
    """

    erroneous: int
    correct: int
    chance: float
    folds: int
    rows: list[StepRow]

    def card(self) -> dict[str, Any]:
        """As report.json has it."""
        return asdict(self)


def summarise_steps(
    records: Sequence[Mapping[str, Any]],
    *,
    folds: int = 5,
    seed: int = 0,
    fit: Sequence[Mapping[str, Any]] | None = None,
    threshold: float | None = None,
) -> StepSummary:
    """The table of the records of score_steps.

    Thresholds are crossed: problems are dealt into folds, all solutions to one problem into the same. Each fold is
    judged by the threshold with the best F1 on the other folds. Or they come from other records, or are given.

    Args:
        records: what is reported.
        folds: >= 2, at most the number of problems; not asked with `fit` or `threshold`.
        seed: of the dealing.
        fit: records, of the same values, of other solutions to choose thresholds on.
        threshold: one for all scores, chosen beforehand.

    Raises:
        ValueError: solutions with an error, or solutions without, are missing (in the records, or in the records that a
            threshold is chosen on), or an argument is out of range.
    """
    labels = [record["label"] for record in records]
    erroneous = sum(label >= 0 for label in labels)
    if not erroneous or erroneous == len(labels):
        raise ValueError(f"{erroneous} of {len(labels)} solutions have an error: F1 needs some with and some without")
    if fit is not None and threshold is not None:
        raise ValueError("fit and threshold exclude each other: thresholds come from one of them")
    parts = [0] * len(records)
    crossed = fit is None and threshold is None
    if crossed:
        parts = _deal([record["problem"] for record in records], folds, seed)
    rows = []
    for value in records[0]["scores"]:
        scores = [record["scores"][value] for record in records]
        if threshold is not None:
            thresholds = [threshold]
        elif fit is not None:
            thresholds = [fit_threshold([r["scores"][value] for r in fit], [r["label"] for r in fit])]
        else:
            thresholds = [
                fit_threshold(
                    [solution_scores for solution_scores, part in zip(scores, parts, strict=True) if part != fold],
                    [label for label, part in zip(labels, parts, strict=True) if part != fold],
                )
                for fold in range(folds)
            ]
        predicted = [
            first_below(solution_scores, thresholds[part]) for solution_scores, part in zip(scores, parts, strict=True)
        ]
        rows.append(_row(value, records, scores, labels, predicted, thresholds))
    chance = fmean(1 / len(next(iter(record["scores"].values()))) for record in records if record["label"] >= 0)
    return StepSummary(erroneous, len(labels) - erroneous, chance, folds if crossed else 0, rows)


def _deal(problems: Sequence[int], folds: int, seed: int) -> list[int]:
    """The fold of each solution: problems in random order, dealt in turn."""
    distinct = sorted(set(problems))
    if isinstance(folds, bool) or not isinstance(folds, int) or not 2 <= folds <= len(distinct):
        raise ValueError(f"folds={folds!r}: 2 to {len(distinct)}, the number of problems, are needed")
    order = np.random.default_rng(seed).permutation(len(distinct))
    fold = {distinct[i]: position % folds for position, i in enumerate(order)}
    return [fold[problem] for problem in problems]


def _row(
    value: str,
    records: Sequence[Mapping[str, Any]],
    scores: Sequence[Sequence[float]],
    labels: Sequence[int],
    predicted: Sequence[int],
    thresholds: Sequence[float],
) -> StepRow:
    counts: dict[int, np.ndarray] = {}  # by problem: met, wrong, kept, correct
    right_steps: list[float] = []
    wrong_steps: list[float] = []
    lowest = 0
    for record, solution_scores, label, prediction in zip(records, scores, labels, predicted, strict=True):
        row = counts.setdefault(record["problem"], np.zeros(4))
        row += [label >= 0 and prediction == label, label >= 0, label < 0 and prediction == label, label < 0]
        right_steps += solution_scores if label < 0 else solution_scores[:label]
        if label >= 0:
            wrong_steps.append(solution_scores[label])
            lowest += min(range(len(solution_scores)), key=solution_scores.__getitem__) == label
    table = np.stack(list(counts.values()))
    met, wrong, kept, correct = table.sum(0)
    low, high = clustered_bootstrap(table, _f1)
    return StepRow(
        value,
        harmonic_mean(met / wrong, kept / correct),
        low,
        high,
        met / wrong,
        kept / correct,
        list(thresholds),
        auc(right_steps, wrong_steps),
        lowest / wrong,
        *wilson(lowest, wrong),
    )
