"""Does a step reward find the step that went wrong? F1 as the library has it, and what the task knows beyond it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from prm_search.evaluation.step_errors import summarise_steps


@dataclass(frozen=True)
class Steps:
    """A response of which every step is known.

    Attributes:
        problem: its place.
        rewards: of its steps.
        wrong: whether each step does not follow from the one before it.
    """

    problem: int
    rewards: list[float]
    wrong: list[bool]

    @property
    def label(self) -> int:
        """The first wrong step, -1 for none."""
        return self.wrong.index(True) if any(self.wrong) else -1

    @property
    def lowest_is_wrong(self) -> bool:
        """Return True if the step with the least reward is one of the wrong ones."""
        return self.wrong[min(range(len(self.rewards)), key=self.rewards.__getitem__)]


def localisation(responses: Sequence[Steps]) -> dict[str, Any]:
    """All figures of a seed; `chance`: the same with the rewards of all steps shuffled, and what a guess would find."""
    wrong = [each for each in responses if each.label >= 0]
    single = [each for each in wrong if sum(each.wrong) == 1]
    found = {
        "responses": len(responses),
        **_f1(responses),
        "lowest_is_wrong": _share([each.lowest_is_wrong for each in wrong]),
        "only_error_found": _share([each.lowest_is_wrong for each in single]),
    }
    chance = {
        "f1": _f1(shuffled(responses))["f1"],
        "lowest_is_wrong": _share([fmean(each.wrong) for each in wrong]),
        "only_error_found": _share([fmean(each.wrong) for each in single]),
    }
    return {**found, "chance": chance}


def shuffled(responses: Sequence[Steps]) -> list[Steps]:
    """The same responses with the rewards of all their steps dealt anew."""
    rewards = [reward for each in responses for reward in each.rewards]
    random.Random("method/shuffled").shuffle(rewards)
    source = iter(rewards)
    return [replace(each, rewards=[next(source) for _ in each.rewards]) for each in responses]


def _f1(responses: Sequence[Steps]) -> dict[str, float]:
    if len({each.label < 0 for each in responses}) < 2:  # F1 needs both kinds
        return {"f1": 0.0, "first_wrong": 0.0, "right_passed": 0.0, "auc": 0.0}
    records = [{"problem": each.problem, "label": each.label, "scores": {"r": each.rewards}} for each in responses]
    (row,) = summarise_steps(records).rows
    return {"f1": row.f1, "first_wrong": row.error_accuracy, "right_passed": row.correct_accuracy, "auc": row.auc}


def _share(of: Sequence[float]) -> float:
    return fmean(of) if of else 0.0
