"""The pilot: a few whole samples of some problems, which tell how long answers are and how far their values spread."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from .trials import Scale

PROBE = 4  # whole samples of a problem
PILOT = 16  # problems


@dataclass(frozen=True)
class Pilot:
    """The task of a pilot: PROBE whole samples of each problem, under these values of every scorer."""

    values: tuple[str, ...]


def scale_of(records: Iterable[Mapping[str, Any]], scorers: Sequence[str], values: Sequence[str]) -> Scale:
    """The scale of a pilot's records, in whatever order these come.

    Args:
        records: of each problem "problem", its place; "tokens" and "depths", of each sample; "values", scorer -> value
            -> number of each sample; "seconds", drawing and scoring; "top_tokens" of the policy.
        scorers: their names.
        values: of plan.PLANNED.

    Raises:
        ValueError: there are no records.
    """
    ordered = sorted(records, key=lambda record: int(record["problem"]))
    if not ordered:
        raise ValueError("no problem of the pilot was answered")
    tokens = sum(sum(record["tokens"]) for record in ordered)
    spread = {
        scorer: {value: _spread([record["values"][scorer][value] for record in ordered]) for value in values}
        for scorer in scorers
    }
    depths = [depth for record in ordered for depth in record["depths"]]
    seconds = math.fsum(record["seconds"] for record in ordered)
    top_tokens = min(record["top_tokens"] for record in ordered)
    return Scale(tokens / (PROBE * len(ordered)), fmean(depths), seconds / tokens, spread, top_tokens)


def _spread(groups: Sequence[Sequence[float]]) -> float:
    """Standard deviation within groups, over all of them; 1 where all are equal."""
    squares = [(x - fmean(group)) ** 2 for group in groups for x in group if math.isfinite(x)]
    return math.sqrt(sum(squares) / max(1, len(squares) - len(groups))) or 1.0
