"""Best of N: whole answers, scored and chosen among."""

from __future__ import annotations

from dataclasses import dataclass

from ..tree import Node
from ..values import Value, resolve_value
from .base import Expand, Run, at_least, distinct


@dataclass(frozen=True)
class BestOfN:
    """Sample n whole answers; `select=` chooses one ("best") or lets them vote.

    Answers are still cut into steps, so every value is defined for them.

    Args:
        n: answers to sample.
        value: what to rank them by; None for q.

    Raises:
        ValueError: n < 1, or no value has this name.
    """

    n: int = 8
    value: Value | str | None = None

    def __post_init__(self) -> None:
        at_least("n", self.n)
        if self.value is not None:
            resolve_value(self.value)

    def run(self, root: Node) -> Run:
        ends = yield Expand([root], self.n, until="end", alive=[root])
        return distinct(ends)
