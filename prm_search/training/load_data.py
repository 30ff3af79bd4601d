"""Data of a training run: the items that a recipe makes of a file of rollouts."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from .data import Item, LabelledResponse, by_prompt, mismatched, pairs, read_rollouts, singles, split, thin
from .negatives import cross_prompt
from .recipe import Recipe


@dataclass
class Data:
    """Data for training and measuring.

    Attributes:
        items: to train on.
        rows: of the file, those to train on and those held out.
        held: rows of held-out problems.
        counts: for the card.
    """

    items: list[Item]
    rows: list[LabelledResponse]
    held: list[LabelledResponse]
    counts: dict[str, Any] = field(default_factory=dict)

    @property
    def made_up(self) -> list[LabelledResponse]:
        """Rows of items that are not in the file, each once."""
        known = {id(row) for row in self.rows}
        made = {id(row): row for item in self.items for row in item.rows if id(row) not in known}
        return list(made.values())


def load_data(rollouts: str | PathLike[str], recipe: Recipe, context: int | None = None) -> Data:
    """The items of a file of rollouts. Raises ValueError where the recipe finds none in it, or OSError."""
    read = read_rollouts(rollouts)
    limit = recipe.max_length if context is None else min(context, recipe.max_length)
    short = [row for row in read if len(row) <= limit]
    rows = thin(short, recipe.problems, recipe.per_problem)
    kept, held = split(rows, recipe.holdout)
    if not kept:
        raise ValueError(f"{os.fspath(rollouts)}: no rollouts to train on are left (longer than {limit}: {len(read)})")
    negatives = cross_prompt(kept, recipe.negatives, recipe.seed, limit)
    learnt = [row for row in [*kept, *negatives] for _ in range(row.count)]  # as often as it was drawn
    if recipe.objective in ("dpo", "nca"):
        items = pairs(learnt, recipe.seed)
    elif recipe.objective == "kto":
        items = mismatched(learnt, recipe.seed, recipe.balance)
    else:
        items = singles(learnt, recipe.balance)
    counts = {
        "responses": len(kept),
        "right": sum(row.label for row in kept),
        "problems": len(by_prompt(kept)),
        "negatives": len(negatives),
        "items": len(items),
        "held_out_responses": len(held),
        "held_out_problems": len(by_prompt(held)),
        "too_long": len(read) - len(short),
    }
    return Data(items, rows, held, counts)
