"""Does a step reward find the step that went wrong? ProcessBench's F1 (arXiv 2412.06559), fitted elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Steps:
    """A response of which every step is known.

    Attributes:
        problem: of the two folds it is in the one of its parity.
        rewards: of its steps.
        wrong: whether each step does not follow from the one before it.
    """

    problem: int
    rewards: list[float]
    wrong: list[bool]

    @property
    def first(self) -> int:
        """The first wrong step, -1 for none."""
        return self.wrong.index(True) if any(self.wrong) else -1

    def found(self, threshold: float) -> int:
        """The first step with less reward than that, -1 for none."""
        return next((i for i, reward in enumerate(self.rewards) if reward < threshold), -1)


def scores(responses: Sequence[Steps], threshold: float) -> tuple[float, float, float]:
    """F1, and the two shares whose harmonic mean it is: first wrong steps found exactly, right responses let pass."""
    wrong = [each.found(threshold) == each.first for each in responses if each.first >= 0]
    right = [each.found(threshold) < 0 for each in responses if each.first < 0]
    if not wrong or not right:
        return 0.0, 0.0, 0.0
    a, b = sum(wrong) / len(wrong), sum(right) / len(right)
    return (2 * a * b / (a + b) if a + b else 0.0), a, b


def fitted(responses: Sequence[Steps]) -> float:
    """The threshold with the best F1."""
    rewards = sorted({reward for each in responses for reward in each.rewards})
    between = [(a + b) / 2 for a, b in pairwise(rewards)]
    stride = max(1, len(between) // 200)
    return max(between[::stride] or [0.0], key=lambda threshold: scores(responses, threshold)[0])


def localisation(responses: Sequence[Steps]) -> dict[str, Any]:
    """All figures. The threshold for problems of one parity is fitted on those of the other."""
    folds = [[each for each in responses if each.problem % 2 == parity] for parity in (0, 1)]
    parts = [scores(folds[k], fitted(folds[1 - k])) for k in (0, 1)]
    f1, first, right = (sum(part[k] for part in parts) / 2 for k in range(3))
    wrong = [each for each in responses if each.first >= 0]
    single = [each for each in wrong if sum(each.wrong) == 1]

    def lowest(each: Steps) -> bool:
        return each.wrong[min(range(len(each.rewards)), key=each.rewards.__getitem__)]

    def share(of: Sequence[float]) -> float:
        return sum(of) / len(of) if of else 0.0

    return {
        "responses": len(responses),
        "f1": f1,
        "first_wrong": first,
        "all_right": right,
        "lowest_is_an_error": share([lowest(each) for each in wrong]),
        "chance_of_an_error": share([sum(each.wrong) / len(each.wrong) for each in wrong]),
        "single_error_found": share([lowest(each) for each in single]),
        "chance_of_a_single_error": share([1 / len(each.wrong) for each in single]),
    }
