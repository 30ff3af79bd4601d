"""Pair accuracy: how often a right response is rewarded above a wrong one."""

from __future__ import annotations

from collections.abc import Sequence

from .data import LabelledResponse, by_prompt


def count_pairs(rows: Sequence[LabelledResponse]) -> int:
    """Pairs of a right and a wrong response to one prompt."""
    labels = [[row.label for row in group] for group in by_prompt(rows).values()]
    return sum(group_labels.count(True) * group_labels.count(False) for group_labels in labels)


def pair_accuracy(rows: Sequence[LabelledResponse], rewards: Sequence[float]) -> float | None:
    """The share of all pairs of a right and a wrong response to one prompt in which the right one has more reward.

    Equal rewards count half. None without pairs.
    """
    value = {id(row): reward for row, reward in zip(rows, rewards, strict=True)}
    won = total = 0.0
    for group in by_prompt(rows).values():
        for right in (value[id(row)] for row in group if row.label):
            for wrong in (value[id(row)] for row in group if not row.label):
                won += 1.0 if right > wrong else 0.5 if right == wrong else 0.0
                total += 1
    return round(won / total, 6) if total else None
